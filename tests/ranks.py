"""What tests/test_parallel.py runs on two ranks: `ranks.py FOLDER`, with a checkpoint of `build()`."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import sys

import sizes
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dmoe_ops import layer
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion, parallel
from dmoe_ops.routing import POLICIES

SIZES = dict(sizes.SIZES, vocab_size=66)
OTHER = dict(norm_head=True, tie_word_embeddings=True, use_bias=True, use_qkv_bias=True, num_shared_experts=0)
SETTINGS = {"dmoe": dict(min_experts=4), "capacity": dict(capacity=6), "des_vote": dict(capacity=5)}
SETTINGS["top4"] = dict(top_k=1)  # of two
LENGTHS = (41, 5)


def prompts():
    drawn = torch.randint(0, sizes.MASK, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return drawn, dict(prompt_lengths=torch.tensor(LENGTHS), gen_length=30, threshold=0.3, steps=4, eos_id=None)


def build(**changes) -> LLaDA2ForDiffusion:
    model = LLaDA2ForDiffusion(LLaDA2Config(**{**SIZES, **changes}), dtype=torch.float32).init_weights(0).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def alike(mesh, what: str, tensor) -> None:
    """That all ranks hold the same bits."""
    tensor = tensor.contiguous().view(torch.uint8)
    found = [torch.empty_like(tensor) for _ in range(mesh.size())]
    dist.all_gather(found, tensor)
    assert all(torch.equal(one, tensor) for one in found), f"{what} differ between ranks"


@torch.no_grad()
def compare(mesh, whole, part, policy: str) -> None:
    ids, options = prompts()
    for model in (whole, part):
        model.set_routing(policy, **SETTINGS.get(policy, {}))
    want, seen, stock = whole.generate(ids, **options), [], layer.block_moe

    def watched(*args, **kwargs):
        out = stock(*args, **kwargs)
        seen.append(out)
        return out

    layer.block_moe = watched
    got = part.generate(ids, **options)
    layer.block_moe = stock
    assert torch.equal(got.tokens, want.tokens), (
        f"{policy}: {(got.tokens == want.tokens).double().mean():.3f} are equal"
    )
    assert got.stats == want.stats, (policy, got.stats, want.stats)
    for _, routed, logits in (seen[0], seen[-1]):
        for name, tensor in (*routed._asdict().items(), ("router_logits", logits)):
            alike(mesh, f"{policy}: {name}", tensor)
    torch.testing.assert_close(part(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
    alike(mesh, f"{policy}: logits", part(ids).logits)


def equal(mesh, folder: str) -> None:
    plain, other = build(), build(**OTHER)
    for experts in parallel.EXPERTS:
        part = parallel.parallelize(copy.deepcopy(plain), mesh, experts)
        for policy in POLICIES:
            compare(mesh, plain, part, policy)
        compare(mesh, other, parallel.parallelize(copy.deepcopy(other), mesh, experts), "dmoe")
        read = parallel.from_pretrained(folder, mesh, experts)
        assert read.state_dict().keys() == part.state_dict().keys()
        compare(mesh, plain, read, "dmoe")
        # Ranks whose random numbers differ draw what rank 0 draws.
        part.set_routing("dmoe", **SETTINGS.get("dmoe", {}))  # as `plain` now
        ids, options = prompts()
        for generator in (None, torch.Generator()):
            (generator or torch.default_generator).manual_seed(mesh.get_rank())
            drawn = part.generate(ids, temperature=1.0, generator=generator, **options).tokens
            alike(mesh, "drawn tokens", drawn)
            wanted = plain.generate(ids, temperature=1.0, generator=torch.Generator().manual_seed(0), **options)
            assert torch.equal(drawn, wanted.tokens)
    for form in ("int8",):
        whole = build(num_shared_experts=1).quantize(form)
        refused(lambda whole=whole: parallel.parallelize(whole, mesh), "experts must be 'expert' for quantised")
        compare(mesh, whole, parallel.parallelize(copy.deepcopy(whole), mesh, "expert"), "dmoe")
    refuse(mesh, part)


def refused(call, said: str) -> None:
    try:
        call()
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"not refused: {said}")


def refuse(mesh, part) -> None:
    refused(lambda: parallel.parallelize(part, mesh), "model must be whole")
    refused(lambda: part.save_pretrained("nowhere"), "model must be whole")
    refused(lambda: part.quantize("int8"), "before it is spread")
    refused(lambda: parallel.parallelize(build(), mesh, "both"), "experts must be one of tensor, expert")
    odd = dict(num_attention_heads=3, num_key_value_heads=1, head_dim=8)
    refused(lambda: parallel.parallelize(build(**odd), mesh), "num_attention_heads=3")
    refused(lambda: parallel.parallelize(build(moe_intermediate_size=15), mesh), "moe_intermediate_size=15")
    fifteen = build(num_experts=15, n_group=1, topk_group=1)
    refused(lambda: parallel.parallelize(fifteen, mesh, "expert"), "num_experts=15")
    refused(
        lambda: parallel.parallelize(LLaDA2ForDiffusion(LLaDA2Config(**SIZES), device="meta"), mesh), "of kind meta"
    )


def killed(mesh, folder: str) -> None:
    """Rank 1 dies in its fifth forward."""
    part = parallel.from_pretrained(folder, mesh)
    forwards = iter(range(5))

    def die(*_) -> None:
        if next(forwards, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    if mesh.get_rank() == 1:
        part.model.layers[-1].register_forward_pre_hook(die)
    ids, options = prompts()
    part.generate(ids, **options)


def main(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    equal(mesh, folder)
    print("equal\n", end="", flush=True)  # one write: lines of two ranks do not mix
    killed(mesh, folder)


if __name__ == "__main__":  # forked, as torch takes seconds to import
    processes = [multiprocessing.get_context("fork").Process(target=main, args=(rank, sys.argv[1])) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print([process.exitcode for process in processes])
