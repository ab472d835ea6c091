"""Derivatives beyond one backward: double backward, torch.func, forward-mode AD, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj-bi-2": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    "GRU": ("GRU", {}),
    "GRU-bi-nobias": ("GRU", {"bidirectional": True, "bias": False}),
    "RNN-tanh": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell": ("RNNCell", {}),
}
LAYERS = [k for k in KINDS if "Cell" not in k]


def make(kind: str, backend: str | None = None) -> nn.Module:
    name, options = KINDS[kind]
    return getattr(fusedrnn, name)(2, 3, dtype=torch.float64, backend=backend, **options)


def make_input(kind: str, batch: int = 2, steps: int = 4) -> Tensor:
    shape = (batch, 2) if "Cell" in kind else (steps, batch, 2)
    return torch.randn(shape, dtype=torch.float64)


def make_hx(module: nn.Module, batch: int = 2) -> Any:
    """A nonzero initial state, in the structure the module takes."""
    x = make_input(type(module).__name__, batch)
    hidden = tree_leaves(module(x))
    states = hidden[1:] if isinstance(module, nn.RNNBase) else hidden
    states = [torch.randn_like(s) for s in states]
    return tuple(states) if len(states) > 1 else states[0]


def as_function(module: nn.Module, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """``f(x, *states, *parameters)`` with every output, for gradcheck."""
    names = [name for name, _ in module.named_parameters()]
    states = 2 if "LSTM" in type(module).__name__ else 1

    def f(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = rest[:states] if states > 1 else rest[0]
        params = dict(zip(names, rest[states:], strict=True))
        return tuple(tree_leaves(functional_call(module, params, (x, hx), options)))

    return f


def leaves(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [
        t.detach().clone().requires_grad_()
        for t in (x, *tree_leaves(make_hx(module)), *module.parameters())
    ]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    """First derivatives, backward and forward mode, and second ones, against differences."""
    module = make(kind)
    inputs = leaves(module, make_input(kind))
    f = as_function(module)
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck_lengths_and_resets(kind: str) -> None:
    module = make(kind)
    options: dict[str, Any] = {
        "lengths": torch.tensor([4, 2]),
        "resets": torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1]]).bool(),
    }
    if "LSTM" in kind:
        options["return_cell_states"] = True
    inputs = leaves(module, make_input(kind))
    f = as_function(module, **options)
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_equals_torch(kind: str) -> None:
    ours = make(kind)
    name, options = KINDS[kind]
    theirs = getattr(nn, name)(2, 3, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    x = make_input(kind).requires_grad_()

    def second(module: nn.Module) -> tuple[Tensor, ...]:
        loss = sum(t.square().sum() for t in tree_leaves(module(x)))
        first = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return (*first, *torch.autograd.grad(penalty, [x, *module.parameters()]))

    close(second(ours), second(theirs))


def test_gradient_penalty_trains() -> None:
    """WGAN-GP's way: the norm of dy/dx is part of the loss."""
    critic = fusedrnn.LSTM(2, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.5)
    x = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
    penalties = []
    for _ in range(30):
        (dx,) = torch.autograd.grad(critic(x)[0].sum(), x, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.2 * penalties[0]


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind: str) -> None:
    module = make(kind)
    dim = 0 if "Cell" in kind else 1
    x = make_input(kind, batch=3)
    params = dict(module.named_parameters())

    def loss(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        out = functional_call(module, params, (sample.unsqueeze(dim),))
        return sum(t.square().sum() for t in tree_leaves(out))  # type: ignore[return-value]

    together = vmap(grad(loss), in_dims=(None, dim))(params, x)
    for b in range(3):
        alone = torch.autograd.grad(loss(params, x.select(dim, b)), list(params.values()))
        close([g[b] for g in together.values()], list(alone))


def difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    eps = 1e-6
    return (f(x + eps * v) - f(x - eps * v)) / (2 * eps)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("kind", KINDS)
def test_jvp_is_not_zero(kind: str, mode: str) -> None:
    """An op without a forward derivative drops the tangent in silence: ours must not."""
    module = make(kind)
    x, v = make_input(kind), make_input(kind)

    def f(x: Tensor) -> Tensor:
        return tree_leaves(module(x))[0]

    expected = difference(f, x, v).detach()
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad}.get(mode, torch.no_grad)
    if mode == "inference":
        module.requires_grad_(False)
    with context():
        _, tangent = jvp(f, (x,), (v,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
    assert tangent.abs().max() > 1e-3
    torch.testing.assert_close(tangent.detach(), expected, rtol=1e-6, atol=1e-8)
    close(dual, tangent)


def test_jvp_through_weights_and_state() -> None:
    module = make("LSTM")
    x, hx = make_input("LSTM"), make_hx(module)
    params = {k: p.detach() for k, p in module.named_parameters()}
    tangents = {k: torch.randn_like(p) for k, p in params.items()}

    def f(params: dict[str, Tensor], hx: tuple[Tensor, ...]) -> Tensor:
        return functional_call(module, params, (x, hx))[0]

    _, tangent = jvp(f, (params, hx), (tangents, hx))
    eps = 1e-6
    moved = [
        f(
            {k: p + s * eps * tangents[k] for k, p in params.items()},
            tuple(h + s * eps * h for h in hx),
        )
        for s in (1, -1)
    ]
    expected = (moved[0] - moved[1]) / (2 * eps)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN-tanh"])
def test_jacobian_and_hessian(kind: str) -> None:
    """Whole matrices of derivatives, by torch.func and by torch.autograd.functional."""
    module = make(kind)
    x = make_input(kind, batch=1, steps=3)

    def y(x: Tensor) -> Tensor:
        return module(x)[0].square()

    def loss(x: Tensor) -> Tensor:
        return y(x).sum()

    close(jacrev(y)(x), torch.autograd.functional.jacobian(y, x))
    close(torch.func.jacfwd(y)(x), jacrev(y)(x))
    second = hessian(loss)(x)
    assert second.abs().max() > 1e-3
    close(second, torch.autograd.functional.hessian(loss, x))


@pytest.mark.parametrize("kind", KINDS)
def test_ensemble(kind: str) -> None:
    """Models with stacked weights, run as one by vmap."""
    models = [make(kind) for _ in range(3)]
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = make_input(kind)

    def one(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
        return functional_call(base, (params, buffers), (x,))

    together = tree_leaves(vmap(one)(params, buffers))
    for k, model in enumerate(models):
        close([t[k] for t in together], tree_leaves(model(x)))


def test_functional_call_uses_the_weights_it_is_given() -> None:
    a, b = make("LSTM"), make("LSTM")
    x = make_input("LSTM")
    out, _ = functional_call(a, dict(b.named_parameters()), (x,))
    close(out, b(x)[0])
    out.sum().backward()
    assert a.weight_hh_l0.grad is None
    assert b.weight_hh_l0.grad is not None


def gradients(module: nn.Module, x: Tensor, run: Callable[..., Any]) -> list[Tensor]:
    out = run(x)
    loss = sum((t * torch.arange(t.numel()).view_as(t).sin()).sum() for t in tree_leaves(out))
    return [*tree_leaves(out), *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind: str, use_reentrant: bool) -> None:
    module = make(kind)
    x = make_input(kind).requires_grad_()

    def flat(x: Tensor) -> tuple[Tensor, ...]:  # a reentrant checkpoint sees no nested tuples
        return tuple(tree_leaves(module(x)))

    results = []
    for out in (checkpoint(flat, x, use_reentrant=use_reentrant), flat(x)):
        x.grad = None
        module.zero_grad()
        torch.autograd.backward(out, [torch.ones_like(t) for t in out])
        results.append([*out, x.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_hooks(kind: str) -> None:
    """Everything backward needs passes through the hooks: saved tensors can be offloaded."""
    module = make(kind)
    x = make_input(kind).requires_grad_()
    expected = gradients(module, x, module)
    store: list[Any] = []

    def pack(t: Tensor) -> int:
        store.append(t.detach().numpy().copy())
        return len(store) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: torch.from_numpy(store[i])):
        actual = gradients(module, x, module)
    assert store
    close(actual, expected)


def test_retain_graph_and_second_backward() -> None:
    module = make("LSTM-proj-bi-2")
    x = make_input("LSTM").requires_grad_()
    y, (h_n, c_n) = module(x)
    loss = y.sum() + h_n.sum() + c_n.sum()
    first = torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_of_one_output(used: int) -> None:
    """The other outputs have no gradient at all."""
    module = make("LSTM-proj-bi-2")
    x = make_input("LSTM").requires_grad_()
    y, (h_n, c_n) = module(x)
    actual = torch.autograd.grad((y, h_n, c_n)[used].sum(), x)
    with fusedrnn.backend("reference"):
        y, (h_n, c_n) = module(x)
    close(actual, torch.autograd.grad((y, h_n, c_n)[used].sum(), x))


def test_inplace_edit_of_an_output() -> None:
    """Raises, or leaves the gradients right: never silently wrong."""
    module = make("LSTM")
    x = make_input("LSTM").requires_grad_()
    expected = torch.autograd.grad((2 * module(x)[0]).sum(), x)
    y, _ = module(x)
    y.mul_(2)
    close(torch.autograd.grad(y.sum(), x), expected)
