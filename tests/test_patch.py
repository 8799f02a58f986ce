"""patch and undo on models that are moved, loaded anew, shared, or of other forms while they are patched."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmoe_ops
from dmoe_ops import BlockMoE, BlockRouting, patch

H, I, E = 16, 8, 8


class Block(nn.Module):
    """LLaDA2's block in a few lines; `form` makes of (y, logits, ids) what it returns, `stacked` keeps the experts as
    dFactory does."""

    def __init__(self, donor, form, stacked=False):
        super().__init__()
        self.gate, self.experts, self.shared_experts, self.form = donor.gate, donor.experts, donor.shared_experts, form
        self.register_buffer("calls", torch.zeros(()))
        if stacked:
            self.experts = nn.Module()
            for name in ("gate_proj", "up_proj", "down_proj"):
                stack = torch.stack([getattr(expert, name).weight.detach() for expert in donor.experts])
                setattr(self.experts, name, nn.Parameter(stack))

    def expert(self, e, x):
        if isinstance(self.experts, nn.ModuleList):
            gate, up, down = (getattr(self.experts[e], f"{name}_proj").weight for name in ("gate", "up", "down"))
        else:
            gate, up, down = (getattr(self.experts, f"{name}_proj")[e] for name in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def forward(self, hidden_states):
        self.calls += 1
        x = hidden_states.flatten(0, 1)
        logits = x.float() @ self.gate.weight.float().T
        score = logits.sigmoid()
        groups = (score + self.gate.expert_bias).unflatten(1, (2, -1))
        kept = groups.topk(2, 2).values.sum(2).argmax(1)
        outside = torch.arange(E).unflatten(0, (2, -1))[None, :, :1] // (E // 2) != kept[:, None, None]
        ids = groups.masked_fill(outside, -torch.inf).flatten(1).topk(2, 1).indices
        weights = score.gather(1, ids)
        weights = weights / weights.sum(1, keepdim=True) * 2.5
        y = torch.stack([sum(w * self.expert(e, row) for e, w in zip(i, ws)) for row, i, ws in zip(x, ids, weights)])
        shared = self.shared_experts
        y = y + shared.down_proj(F.silu(shared.gate_proj(x)) * shared.up_proj(x))
        lead = hidden_states.shape[:2]
        return self.form(y.view_as(hidden_states).to(hidden_states), logits.view(*lead, E), ids.view(*lead, 2))


FORMS = {
    "y": lambda y, logits, ids: y,
    "y, None": lambda y, logits, ids: (y, None),
    "y, logits": lambda y, logits, ids: (y, logits),
    "y, flat logits": lambda y, logits, ids: (y, logits.flatten(0, 1)),
    "y, (logits, ids)": lambda y, logits, ids: (y, (logits, ids)),
    "y, flat (logits, ids)": lambda y, logits, ids: (y, (logits.flatten(0, 1), ids.flatten(0, 1))),
}


def flat(out):
    return [out] if not isinstance(out, tuple) else [leaf for part in out for leaf in flat(part)]


def network(*blocks):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(H, H), *blocks])
    return model


@pytest.fixture
def model(make_block):
    torch.manual_seed(0)
    return network(make_block(), make_block())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_patched_block_returns_what_the_original_did(form, stacked, make_block):
    torch.manual_seed(0)
    model = network(Block(make_block(), FORMS[form], stacked).train())
    block, x = model.layers[1], torch.randn(2, 9, H)
    with torch.no_grad():
        expected = block.eval()(x)
    block.train()
    block.calls.zero_()
    storage = {name: value.clone() for name, value in model.state_dict().items()}
    with patch(model, "token"), torch.no_grad():
        assert isinstance(model.layers[1], BlockMoE) and model.layers[1].training
        ours = model.layers[1](x)
        copied = copy.deepcopy(model.layers[1])(x)
    assert type(ours) is type(expected) and len(flat(ours)) == len(flat(expected))
    for mine, copy_of, theirs in zip(flat(ours), flat(copied), flat(expected)):
        assert (mine is None) == (theirs is None)
        if mine is None:
            continue
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, copy_of)
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(mine.sort(-1).values, theirs.sort(-1).values)
    assert model.layers[1] is block and block.training and block.calls == 0
    assert all(torch.equal(value, storage[name]) for name, value in model.state_dict().items())
    assert all(value.is_contiguous() for value in block.parameters())
    with torch.no_grad():
        torch.testing.assert_close(flat(block.eval()(x))[0], flat(expected)[0])


@pytest.mark.parametrize(
    "form, says",
    [
        (
            lambda y, logits, ids: (y, logits, ids),
            "got (a tensor [1, 32, 16], a tensor [1, 32, 8], a tensor [1, 32, 2])",
        ),
        (lambda y, logits, ids: dict(y=y), "got dict"),
        (lambda y, logits, ids: y.flatten(0, 1), "got a tensor [32, 16]"),
        (lambda y, logits, ids: (y, ids), "got (a tensor [1, 32, 16], a tensor [1, 32, 2])"),
        (lambda y, logits, ids: y + torch.ones(3), "got RuntimeError"),
        (lambda y, logits, ids: (y,), "got (a tensor [1, 32, 16])"),
    ],
)
def test_a_block_of_another_form_is_refused_before_anything_changes(form, says, make_block):
    model = network(make_block(), Block(make_block(), form))
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"^layers\.2: forward must") as error:
        patch(model)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert dict(model.named_modules()) == modules
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before


CHANGES = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "there and back": lambda model: model.half().float(),
    "load": lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    "assign": lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True),
    "assign another dtype": lambda model: model.load_state_dict(
        {k: (v + 1).double() for k, v in model.state_dict().items()}, assign=True
    ),
    "new parameters": lambda model: [
        setattr(m, n, nn.Parameter(p.data * 2))
        for m in model.modules()
        for n, p in list(m._parameters.items())
        if p is not None
    ],
}


def reference_state(layer):
    """The weights of a `BlockMoE` under the names of the block it came from."""
    state = {"gate.weight": layer.gate_weight, "gate.expert_bias": layer.expert_bias}
    for i, (w13, w2) in enumerate(zip(layer.w13, layer.w2)):
        gate, up = w13.chunk(2)
        parts = dict(gate_proj=gate, up_proj=up, down_proj=w2)
        state |= {f"experts.{i}.{name}.weight": value for name, value in parts.items()}
    gate, up = layer.shared_w13.chunk(2)
    parts = dict(gate_proj=gate, up_proj=up, down_proj=layer.shared_w2)
    return state | {f"shared_experts.{name}.weight": value for name, value in parts.items()}


@pytest.mark.parametrize("change", CHANGES)
def test_undo_gives_back_what_the_layers_hold_now(change, model):
    originals = list(model.layers)
    parameters = dict(model.named_parameters())
    handle = patch(model)
    with torch.no_grad():
        CHANGES[change](model)
    held = [{k: v.detach().clone() for k, v in reference_state(layer).items()} for layer in model.layers[1:]]
    handle.undo()
    assert list(model.layers) == originals
    for block, expected in zip(model.layers[1:], held):
        state = block.state_dict()
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    for name, parameter in model.named_parameters():
        if "layers.0" not in name:  # an optimizer goes on with the same objects
            assert parameter is parameters[name]


def test_undo_of_a_bfloat16_model_keeps_the_dtype_of_its_bias(make_block):
    model = network(make_block(dtype=torch.bfloat16))
    model.layers[1].gate.expert_bias = model.layers[1].gate.expert_bias.bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch(model).undo()
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    handle = patch(model)
    model.layers[1].expert_bias.fill_(1 / 3)  # which bfloat16 can't hold
    handle.undo()
    assert torch.equal(model.layers[1].gate.expert_bias, torch.full((E,), 1 / 3))


def test_undo_gives_back_gradients_and_what_is_trained(model):
    handle = patch(model)
    model.layers[1](torch.randn(2, 9, H))[0].square().sum().backward()
    model.layers[2].requires_grad_(False)
    w13, w2 = model.layers[1].w13.grad.clone(), model.layers[1].w2.grad.clone()
    handle.undo()
    for i, expert in enumerate(model.layers[1].experts):
        assert torch.equal(torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad]), w13[i])
        assert torch.equal(expert.down_proj.weight.grad, w2[i])
        assert expert.gate_proj.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in model.layers[2].parameters())
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("change", ["nothing", "half", "a new gradient"])
def test_undo_and_a_gradient_from_before(change, model):
    """It stays where the weight is still of its kind, and gives way to a newer one."""
    weight = model.layers[1].experts[2].up_proj.weight
    weight.grad = torch.full((I, H), 3.0)
    handle = patch(model)
    if change == "half":
        model.half()
    elif change == "a new gradient":
        model.layers[1].w13.grad = torch.full_like(model.layers[1].w13, 5)
    handle.undo()
    assert (weight.grad is None) == (change == "half")
    if change != "half":
        assert (weight.grad == (3 if change == "nothing" else 5)).all()


def test_stacked_experts_that_are_fewer_than_their_width(make_block):
    model = network(Block(make_block(intermediate=12, experts=4, top_k=2), FORMS["y"], stacked=True))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layer = BlockMoE.from_hf(
        model.layers[1], BlockRouting(num_experts=4, top_k=2, n_group=2, topk_group=1, min_experts=2)
    )
    assert layer.w13.shape == (4, 24, H)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("missing", ["gate.weight", "experts.up_proj", "experts.down_proj"])
def test_a_block_that_lacks_a_tensor_is_none(missing, stacked, make_block):
    block = Block(make_block(), FORMS["y"], stacked)
    owner, _, name = missing.partition(".")
    for module in [block.gate] if owner == "gate" else [block.experts] if stacked else block.experts:
        delattr(module, name)
    with pytest.raises(ValueError, match="module must have the members of a sparse MoE block"):
        BlockMoE.from_hf(block, BlockRouting(num_experts=E, top_k=2, n_group=2, topk_group=1))
    with pytest.raises(ValueError, match="without any"):
        patch(network(block))


def test_a_weight_in_two_places_is_refused(make_block):
    block = make_block()
    block.experts[3].up_proj.weight = block.experts[5].up_proj.weight
    with pytest.raises(ValueError, match="experts must each have weights of their own"):
        BlockMoE.from_hf(block, BlockRouting(num_experts=E, top_k=2, n_group=2, topk_group=1))


def test_undo_keeps_what_was_trained_of_each_expert(model):
    model.layers[1].experts[3].requires_grad_(False)
    patch(model).undo()
    trained = [parameter.requires_grad for expert in model.layers[1].experts for parameter in expert.parameters()]
    assert trained == [i // 3 != 3 for i in range(3 * E)]


def test_undo_refuses_layers_that_are_gone_or_empty(model):
    handle = patch(model)
    layer, model.layers[2] = model.layers[2], nn.Identity()
    with pytest.raises(ValueError, match=r"^layers\.2 must still be the layer that patch put there, got Identity"):
        handle.undo()
    assert isinstance(model.layers[1], BlockMoE)
    model.layers[2] = layer
    layer.w2 = nn.Parameter(torch.empty(E, H, I, device="meta"))
    with pytest.raises(ValueError, match=r"^layers\.2: w2 must still hold the weights"):
        handle.undo()
    assert isinstance(model.layers[1], BlockMoE)
    for value, got in ((None, "None"), (nn.Parameter(torch.zeros(1)), r"\[1\] on cpu")):
        layer.w2 = value
        for undo in (handle.undo, lambda: layer.give_back(handle._originals["layers.2"])):
            with pytest.raises(
                ValueError, match=rf"w2 must still hold the weights that the layer took over, got {got}$"
            ):
                undo()
    layer.w2 = nn.Parameter(torch.zeros(E, H, I))
    handle.undo()
    assert not any(isinstance(module, BlockMoE) for module in model.modules())


def test_a_block_in_two_places_is_one_layer_in_both(make_block):
    block = make_block()
    model = network(block, make_block(), block)
    model.again = model.layers
    handle = patch(model)
    assert model.layers[1] is model.layers[3] and isinstance(model.layers[1], BlockMoE)
    assert model.layers[2] is not model.layers[1]
    model.double()
    handle.undo()
    assert model.layers[1] is model.layers[3] is block
    assert block.experts[0].up_proj.weight.dtype == block.gate.weight.dtype == torch.float64


@pytest.mark.parametrize("where", ["in a block", "in two blocks"])
def test_experts_that_share_weights_are_refused(where, model):
    block = model.layers[1 if where == "in a block" else 2]
    block.experts[5] = model.layers[1].experts[0]
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="experts must each have weights of their own"):
        patch(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("name, shape", [("up_proj", (E, I, H + 1)), ("down_proj", (E, I, H)), ("gate_proj", (E, I))])
def test_stacked_experts_of_wrong_shapes_are_refused(name, shape, make_block):
    model = network(Block(make_block(), FORMS["y"], stacked=True))
    setattr(model.layers[1].experts, name, nn.Parameter(torch.zeros(shape)))
    with pytest.raises(ValueError, match=rf"^layers\.1: experts\.{name} must"):
        patch(model)


def rotary(inv_freq, model, **config):
    model.rotary_emb = nn.Module()
    model.rotary_emb.register_buffer("inv_freq", inv_freq, persistent=False)
    model.config = types.SimpleNamespace(rope_theta=1e4, **config)
    return model


def frequencies(theta=1e4, size=8):
    return theta ** -(torch.arange(size) / size)


@pytest.mark.parametrize(
    "inv_freq",
    [
        torch.zeros(8),
        torch.full((8,), float("nan")),
        torch.full((8,), 1e30),
        torch.ones(8),
        frequencies().flip(0),
        frequencies(5e5),
        -frequencies(),
        torch.cat([frequencies()[:7], torch.tensor([float("inf")])]),
        frequencies().to("meta"),
        torch.zeros(0),
    ],
)
def test_patch_refuses_a_rotary_embedding_that_holds_garbage(inv_freq, model):
    with pytest.raises(ValueError, match=r"^rotary_emb\.inv_freq must hold the frequencies") as error:
        patch(rotary(inv_freq, model))
    assert "\n" not in str(error.value)
    assert not any(isinstance(module, BlockMoE) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patch_takes_a_right_rotary_embedding(dtype, model):
    patch(rotary(frequencies().to(dtype), model)).undo()
    patch(rotary(frequencies() / 4, model, rope_scaling=dict(type="linear", factor=4))).undo()
    rotary(frequencies(6e5), model, rope_parameters=dict(rope_theta=6e5, rope_type="default"))
    patch(model).undo()


def test_patch_takes_the_routing_of_the_models_config(model):
    def routing(*args, **config):
        model.config = types.SimpleNamespace(**config)
        with patch(model, *args) as handle:
            return handle.routing

    geometry = dict(num_experts=8, top_k=2, n_group=2, topk_group=1)
    assert routing() == BlockRouting.policy("dmoe", **geometry)
    wanted = BlockRouting.policy("dmoe", **geometry, top_p=0.3, block_size=16)
    assert routing(core_threshold=0.3, block_size=16, expert_capacity=0) == wanted
    assert routing("token", core_threshold=0.3) == BlockRouting.policy("token", **geometry)
    ungrouped = dict(geometry, n_group=1)
    wanted = BlockRouting.policy("capacity", **ungrouped, capacity=3, block_size=32)
    assert routing(expert_capacity=3) == wanted
    assert routing("token", expert_capacity=3) == BlockRouting.policy("token", **ungrouped)
    with pytest.raises(ValueError, match="policy must be given"):
        routing(core_threshold=0.3, expert_capacity=3)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 1.5"):
        routing(core_threshold=1.5)
    with pytest.raises(ValueError, match=r"model\.config\.quantization_config must be null"):
        routing(quantization_config=dict(quant_method="gptq"))
    assert not any(isinstance(module, dmoe_ops.BlockMoE) for module in model.modules())


# Blocks in the shape of Qwen3-MoE -----------------------------------------------------------------------------------------


class Softmax(nn.Module):
    """Qwen3-MoE's block in a few lines: no selection bias, no shared expert. fused: experts stacked as transformers 5 does,
    and y alone comes back; else a list, and flat router logits come too."""

    def __init__(self, donor, fused, norm_topk_prob, activation=F.silu):
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E, bias=False), donor.experts
        self.fused, self.act_fn, self.top_k = fused, activation, 3
        self.norm_topk_prob = norm_topk_prob
        if fused:
            gate, up, down = (
                torch.stack([getattr(expert, name).weight.detach() for expert in donor.experts])
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            self.experts = nn.Module()
            self.experts.gate_up_proj, self.experts.down_proj = (
                nn.Parameter(torch.cat([gate, up], 1)),
                nn.Parameter(down),
            )

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, 1)
        logits = self.gate(x)
        weights, ids = logits.softmax(1, dtype=torch.float).topk(3, 1)
        weights = weights / weights.sum(1, keepdim=True) if self.norm_topk_prob else weights
        y = torch.stack([sum(w * self.expert(e, row) for e, w in zip(i, ws)) for row, i, ws in zip(x, ids, weights)])
        y = y.view_as(hidden_states)
        return y if self.fused else (y, logits)

    def expert(self, e, x):
        if self.fused:
            gate, up = self.experts.gate_up_proj[e].chunk(2)
            down = self.experts.down_proj[e]
        else:
            gate, up, down = (getattr(self.experts[e], f"{name}_proj").weight for name in ("gate", "up", "down"))
        return F.linear(self.act_fn(F.linear(x, gate)) * F.linear(x, up), down)


def softmax_model(make_block, fused, norm_topk_prob=True, **options):
    torch.manual_seed(0)
    model = network(*(Softmax(make_block(), fused, norm_topk_prob, **options) for _ in range(2)))
    model.config = types.SimpleNamespace(block_size=4)
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_blocks_without_a_selection_bias(fused, norm_topk_prob, make_block):
    model, x = softmax_model(make_block, fused, norm_topk_prob), torch.randn(2, 10, H)
    block, storage = model.layers[1], {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    with torch.no_grad():
        expected = block(x)
    with patch(model) as handle, torch.no_grad():
        assert handle.routing == BlockRouting.policy(
            "token", num_experts=E, top_k=3, n_group=1, topk_group=1, score="softmax", block_size=4,
            norm_topk_prob=norm_topk_prob, routed_scaling_factor=1.0,
        )  # fmt: skip
        assert handle.layers["layers.1"].expert_bias is None
        for mine, theirs in zip(flat(model.layers[1](x)), flat(expected)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            assert mine.shape == theirs.shape
        handle.layers["layers.2"].w13.mul_(2)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, storage[name])}
    assert changed and all(name.startswith("layers.2.experts") and "down_proj" not in name for name in changed)
    with patch(model, "dmoe", min_experts=3, max_experts=3) as handle, torch.no_grad():
        handle.layers["layers.1"].train(False)
        _, (_, ids) = BlockMoE.forward(handle.layers["layers.1"], x)
        assert all(len(part.unique()) == 3 for row in ids for part in row.split(4))


def test_their_gradients_come_back(make_block):
    model, x = softmax_model(make_block, True), torch.randn(2, 8, H)
    model.layers[1](x).sum().backward()
    want = {name: value.grad.clone() for name, value in model.layers[1].named_parameters()}
    model.zero_grad()
    with patch(model):
        model.layers[1](x).sum().backward()
    for name, value in model.layers[1].named_parameters():
        torch.testing.assert_close(value.grad, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("owner", ["block", "experts", "act_fn"])
def test_their_activation_is_where_they_keep_it(owner, make_block):
    gelu = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
    model = softmax_model(make_block, True, activation=gelu)
    for block in model.layers[1:]:
        if owner == "act_fn":
            block.experts.act_fn = type("GELUTanh", (nn.Module,), {})()
        else:
            keeper = block if owner == "block" else block.experts
            keeper.config = types.SimpleNamespace(hidden_activation="gelu_pytorch_tanh")
    x = torch.randn(2, 8, H)
    with torch.no_grad():
        expected = model.layers[1](x)
        with patch(model, "token") as handle:
            assert handle.layers["layers.1"].activation == "gelu_tanh"
            torch.testing.assert_close(model.layers[1](x), expected, rtol=1e-4, atol=1e-5)


def other_activation(block):
    block.experts.act_fn = nn.GELU()


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda b: b.gate.register_buffer("e_score_correction_bias", torch.zeros(E)), "gate.e_score_correction_bias"),
        (lambda b: setattr(b, "shared_expert", nn.Linear(2, 2)), "got shared_expert.weight"),
        (lambda b: setattr(b, "gate", nn.Linear(H, E)), "got gate.bias"),
        (lambda b: setattr(b, "n_group", 2), "n_group must be 1 in a block without gate.expert_bias, got 2"),
        (lambda b: setattr(b, "norm_topk_prob", None), "norm_topk_prob must be there"),
        (lambda b: setattr(b.experts, "is_transposed", True), "it holds its weights transposed"),
        (lambda b: setattr(b.experts, "has_bias", True), "it has biases"),
        (other_activation, "experts.act_fn must be SiLU or GELU (tanh), got GELU"),
        (
            lambda b: setattr(b.experts, "down_proj", nn.Parameter(torch.zeros(E, I, H))),
            "experts.down_proj must have shape",
        ),
    ],
)
def test_what_computes_more_is_refused_by_name(change, says, make_block):
    model = softmax_model(make_block, True)
    change(model.layers[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        patch(model, "token")
    assert says in str(error.value) and str(error.value).startswith("layers.1: ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
