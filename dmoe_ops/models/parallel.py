"""A model over several ranks, by torch.distributed's tensor parallelism. Every rank calls the same methods with the
same arguments and gets the same results.

Attention is split by heads, dense MLPs and the shared expert by columns and rows, embedding and head by vocabulary, routed
experts by columns and rows ("tensor") or dealt out whole ("expert"). Every rank routes for itself: its hidden states are
those of the others bit for bit, and so are its ids and weights. A layer adds up its parts once behind attention and once
behind its MLP.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..experts import map_of_rank
from ..layer import BlockMoE
from . import checkpoint, families, hub
from .config import OWN
from .devices import usable
from .layers import Attention, Layer
from .model import DiffusionModel, open_checkpoint, stored_dtype
from .names import checkpoint_tensors

EXPERTS = ("tensor", "expert")


class ParallelModel(DiffusionModel):
    """A rank's part of a model: what `parallelize` makes of one. mesh, experts: as they were given."""

    mesh: DeviceMesh
    experts: str

    @property
    def bytes_per_expert(self) -> int:
        return super().bytes_per_expert * (self.mesh.size() if self.experts == "tensor" else 1)

    def generate(self, input_ids, *, temperature: float = 0.0, generator=None, **options):
        """See `DiffusionModel.generate`. Tokens are drawn as rank 0 draws them. Raises RuntimeError, one line, where
        another rank is gone."""
        with named_loss(self.mesh):
            if temperature:
                generator = self._as_on_rank_0(generator)
            return super().generate(input_ids, temperature=temperature, generator=generator, **options)

    def forward(self, *args, **options):
        with named_loss(self.mesh):
            return super().forward(*args, **options)

    def head(self, hidden) -> torch.Tensor:
        hidden = DTensor.from_local(hidden, self.mesh, [Replicate()], run_check=False)
        return super().head(hidden).full_tensor()

    def checkpoint_tensors(self):
        raise ValueError(f"model must be whole for this, got a part of {self.mesh.size()}")

    def quantize(self, form: str):
        raise ValueError(f"model must be quantised ({form}) before it is spread over {self.mesh.size()} ranks")

    def _as_on_rank_0(self, generator):
        if generator is None:
            on_gpu = self.device.type == "cuda"
            generator = torch.cuda.default_generators[self.device.index] if on_gpu else torch.default_generator
        state = generator.get_state().to(self.device)
        dist.broadcast(state, group=self.mesh.get_group(), group_src=0)
        generator.set_state(state.cpu())
        return generator


def parallelize(model: DiffusionModel, mesh: DeviceMesh, experts: str = "tensor") -> ParallelModel:
    """Leaves of `model`, which every rank holds whole, the rank's own part; the model is changed in place and returned.

    mesh: one dimension, from `torch.distributed.init_device_mesh`, on the kind of device that the model is on.
    experts: "tensor" splits every routed expert, "expert" deals the experts out: rank r has the r-th run of them.

    Raises ValueError, before anything is changed, for a geometry that the ranks don't divide, naming the key of
    config.json, and for quantised experts under "tensor".
    """
    _check(model, mesh, experts)
    for part in _parts(model):
        _shard(part, mesh, experts)
    return _as_parallel(model, mesh, experts)


def from_pretrained(
    folder, mesh: DeviceMesh, experts: str = "tensor", *, policy: str = OWN, dtype=None, device=None, **overrides
) -> ParallelModel:
    """`dmoe_ops.load` and `parallelize` in one, layer by layer: no rank ever holds more than its own
    part and one whole layer."""
    dtype, device = checkpoint.dtype_of(dtype), usable(device)
    config = families.config_of(folder)
    config.routing(policy, **overrides)  # a wrong policy shows before anything is opened
    stored, _ = open_checkpoint(config, hub.folder_of(folder))
    dtype = dtype or stored_dtype(stored, config)
    model = DiffusionModel(config, dtype=dtype, device="meta")._quantize_like(stored)
    model.set_routing(policy, **overrides)
    _check(model, mesh, experts, device=device or torch.get_default_device())
    names = {module: name for name, module in model.named_modules()}
    for part in _parts(model):
        part.to_empty(device=device or torch.get_default_device())
        with torch.no_grad():
            stored.read(checkpoint_tensors(part.state_dict(prefix=f"{names[part]}."), config))
        _shard(part, mesh, experts)
    return _as_parallel(model.eval(), mesh, experts)


def _parts(model: DiffusionModel) -> list[nn.Module]:
    head = [] if model.config.tie_word_embeddings else [model.lm_head]
    return [model.model.word_embeddings, *model.model.layers, model.model.norm, *head]


def _check(model: DiffusionModel, mesh: DeviceMesh, experts: str, device=None) -> None:
    config, device = model.config, torch.device(device or model.device)
    if experts not in EXPERTS:
        raise ValueError(f"experts must be one of {', '.join(EXPERTS)}, got {experts!r}")
    if isinstance(model, ParallelModel):
        raise ValueError(f"model must be whole, got a part of {model.mesh.size()}")
    if mesh.ndim != 1 or mesh.device_type != device.type:
        raise ValueError(f"mesh must have one dimension of kind {device.type}, got {mesh.ndim} of {mesh.device_type}")
    divided = ["num_attention_heads", "num_key_value_heads"]
    divided += ["intermediate_size"] * (config.moe_layers < config.num_hidden_layers)
    quantised = any(moe.form for moe in model.moe_layers)
    if experts == "tensor" and quantised:
        raise ValueError("experts must be 'expert' for quantised ones, got 'tensor'")
    divided += ["moe_intermediate_size"] if experts == "tensor" or config.shared_intermediate_size else []
    divided += ["num_experts"] * (experts == "expert")
    for name in divided:
        if getattr(config, name) % mesh.size():
            raise ValueError(
                f"mesh must have a number of ranks that divides {name}={getattr(config, name)}, got {mesh.size()}"
            )


def _as_parallel(model: DiffusionModel, mesh: DeviceMesh, experts: str) -> ParallelModel:
    model.__class__ = ParallelModel
    model.mesh, model.experts = mesh, experts
    return model


def _shard(part: nn.Module, mesh: DeviceMesh, experts: str) -> None:
    """Leaves of an embedding, a layer or a head this rank's part; a norm stays whole."""
    plan = None
    if isinstance(part, nn.Embedding):
        plan = RowwiseParallel(input_layouts=Replicate())
    elif isinstance(part, nn.Linear):
        plan = ColwiseParallel()
    elif isinstance(part, Layer):
        _shard_heads(part.attention, mesh)
        plan = {"attention.query_key_value": ColwiseParallel(), "attention.dense": RowwiseParallel()}
        if isinstance(part.mlp, BlockMoE):
            _shard_experts(part.mlp, mesh, experts)
        else:
            plan |= {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
            plan["mlp.down_proj"] = RowwiseParallel()
    if plan is not None:
        parallelize_module(part, mesh, plan, src_data_rank=None)


def _shard_heads(attention: Attention, mesh: DeviceMesh) -> None:
    """Puts the rows of a fused projection in the order of the ranks: each one's query, key and value heads together."""
    ranks, linear = mesh.size(), attention.query_key_value
    sizes = [heads * attention.head_dim for heads in (attention.heads, attention.kv_heads, attention.kv_heads)]
    for name, whole in list(linear.named_parameters()):
        parts = [part.chunk(ranks) for part in whole.detach().split(sizes)]
        ordered = torch.cat([chunks[rank] for rank in range(ranks) for chunks in parts])
        setattr(linear, name, nn.Parameter(ordered, whole.requires_grad))
    attention.heads //= ranks
    attention.kv_heads //= ranks


def _shard_experts(moe: BlockMoE, mesh: DeviceMesh, experts: str) -> None:
    rank, ranks = mesh.get_local_rank(), mesh.size()

    def keep(name: str, part) -> None:
        whole = getattr(moe, name)
        if whole is not None:
            own = part(whole.detach()).clone()
            setattr(moe, name, nn.Parameter(own, whole.requires_grad) if isinstance(whole, nn.Parameter) else own)

    def columns(whole):
        return whole.chunk(ranks, -1)[rank]

    def rows(whole):  # of gate and of up
        return whole.unflatten(-2, (2, -1)).chunk(ranks, -2)[rank].flatten(-3, -2)

    def run(whole):
        return whole.chunk(ranks)[rank]

    for name, of_tensor in (("w13", rows), ("w2", columns)):
        if experts == "expert":
            keep(name, run)
            keep(f"{name}_scale", run)
        else:
            keep(name, of_tensor)
    if experts == "expert":
        local = moe.routing.num_experts // ranks
        moe.expert_map = map_of_rank(moe.routing.num_experts, local, rank, moe.w13.device)
    if moe.shared_w13_scale is None:
        keep("shared_w13", rows)
        keep("shared_w2", columns)
    elif rank:  # groups of quantised weights are not cut: rank 0 has the shared expert
        for name in ("shared_w13", "shared_w2", "shared_w13_scale", "shared_w2_scale"):
            setattr(moe, name, None)

    def add_up(moe, inputs, outputs):
        y, routed = outputs
        whole = DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local(), routed

    moe.register_forward_hook(add_up)


@contextlib.contextmanager
def named_loss(mesh: DeviceMesh):
    """Says in one line that a rank is gone, which a collective tells in the words of its transport."""
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if isinstance(error, dist.DistError) or any(
            word in said for word in ("gloo", "NCCL", "Connection closed", "Connection reset")
        ):
            raise RuntimeError(
                f"one of {mesh.size()} ranks is gone or does not answer, says rank {mesh.get_local_rank()}: {said:.300}"
            ) from None
        raise
