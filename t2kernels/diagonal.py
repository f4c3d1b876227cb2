"""From expert vectors to the diagonal that kernels take: parametrisation, mixing, σ⊙z.

Everything that is not a matrix product lives here, in fp32, differentiable, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARAMETRISATIONS = ("direct", "sigmoid-normalised")
MIXTURES = ("deviation", "paper", "paper-normalised", "authors")
# What a form divides by.
DIVISORS = {"paper-normalised": "Σα", "authors": "Σ(σ⊙z)"}
# A sum is 0 when it is this small beside its terms: ten times what rounding in fp32 leaves over.
_CANCELLED = 1e-6


def _check_tensor(what: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(value).__name__}.")


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _may_look(t: Tensor) -> bool:
    """Whether looking at values is free: on a CPU, with nobody between us and them."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def check_sigma(S: Tensor) -> None:
    """Raise on negative or non-finite singular values; on a CPU only, where looking is free."""
    if S.numel() == 0 or not _may_look(S):
        return
    low, high = (v.item() for v in torch.aminmax(S.detach()))
    if not (low >= 0 and high < float("inf")):
        raise ValueError(
            f"S must hold finite singular values ≥ 0, got values from {low} to {high}. "
            "Make factors with t2kernels.decompose(weight)."
        )


def _normalised(S: Tensor, z: Tensor) -> Tensor:
    """z·Σσ / Σ(σ⊙z), which gives W′ the nuclear norm of W; 1 where W is all zeros."""
    norm, new = S.sum(), (S * z).sum(-1, keepdim=True)
    zero = norm == 0
    # Divided by something, so that neither the value nor the gradient is 0/0.
    scale = norm / torch.where(zero, 1.0, new)
    return torch.where(zero, 1.0, z * scale)


def effective_multiplier(S: Tensor, z: Tensor, parametrisation: str = "direct") -> Tensor:
    """z_eff (..., r): what multiplies σ. 1 is the base.

    "direct" (the paper's text): z_eff = z. "sigmoid-normalised" (the authors' code): with
    s = sigmoid(z), z_eff = s·Σσ / Σ(σ⊙s); any constant z is the base.
    """
    _check_choice("parametrisation", parametrisation, PARAMETRISATIONS)
    _check_tensor("S", S)
    _check_tensor("z", z)
    if S.dim() != 1 or z.shape[-1:] != S.shape:
        raise ValueError(
            f"z must have shape (..., r) with r = {S.shape[-1] if S.dim() else 0} to match "
            f"S {tuple(S.shape)}, got {tuple(z.shape)}. Was this expert trained for another layer?"
        )
    if not z.is_floating_point():
        raise TypeError(f"z must be a floating point tensor, got {z.dtype}.")
    if z.device != S.device:
        raise ValueError(f"z and S must be on one device, got {z.device} and {S.device}.")
    z = z if z.dtype == torch.float64 else z.float()
    if parametrisation == "direct":
        return z
    s = torch.sigmoid(z)
    return _normalised(S.to(z.dtype), s)


def effective_diagonal(S: Tensor, z: Tensor, parametrisation: str = "direct") -> Tensor:
    """d = σ⊙z_eff (..., r), the diagonal of W′ = U·diag(d)·Vᵀ (paper, section 3.1).

    Equivalent to ``S * z`` for "direct"; "sigmoid-normalised" is the authors' code, see
    ``effective_multiplier``. The result is fp32 (fp64 if z is), differentiable in z.

    Args:
        S: (r,) singular values.
        z: (..., r) in any floating dtype.
        parametrisation: "direct" or "sigmoid-normalised".

    >>> import torch
    >>> effective_diagonal(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    _check_tensor("S", S)
    check_sigma(S)
    multiplier = effective_multiplier(S, z, parametrisation)
    return S.to(multiplier.dtype) * multiplier


def mix(Z: Tensor, alpha: Tensor, form: str = "deviation", S: Tensor | None = None) -> Tensor:
    """One effective multiplier (B, r) out of K experts for each of B requests.

    "deviation": z = 1 + Σ_k α_k (z_k − 1): {"math": 0.5} is half-way from the base to math.
    "paper": z = Σ_k α_k z_k; the same wherever Σα = 1.
    "paper-normalised": z = Σ_k α_k z_k / Σα.
    "authors": z = Σ_k α_k z_k, rescaled so that Σ(σ⊙z) = Σσ (their code mixes first and
    normalises the nuclear norm after).

    Args:
        Z: (K, r) effective multipliers. alpha: (B, K). S: (r,), for "authors" only.

    A row is summed over the experts in their order, element by element, so its bits depend on
    neither the other rows nor on experts of weight 0.

    >>> import torch
    >>> mix(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5]]))
    tensor([[2., 1.]])
    """
    _check_choice("mixture", form, MIXTURES)
    _check_tensor("mix: Z", Z)
    _check_tensor("mix: alpha", alpha)
    if Z.dim() != 2 or alpha.dim() != 2 or alpha.shape[1] != Z.shape[0]:
        raise ValueError(
            f"mix: alpha must be (B, K) = (B, {Z.shape[0] if Z.dim() else 0}) for Z (K, r) = "
            f"{tuple(Z.shape)}, got {tuple(alpha.shape)}. One weight per expert and request."
        )
    if form == "authors" and S is None:
        raise ValueError("mix: the form 'authors' needs S, the singular values.")
    if form in DIVISORS and _may_look(alpha):
        bad = undefined(Z, alpha, form, S).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"mix: form {form!r} divides by {DIVISORS[form]}, which is 0 for row {row} of "
                f"alpha, {alpha[row].tolist()}. Give weights that do not cancel, or use "
                "'deviation', in which weights of 0 are the base."
            )
    deviation = form == "deviation"
    total = Z.new_full((alpha.shape[0], Z.shape[1]), 1.0 if deviation else 0.0)
    for k in range(Z.shape[0]):
        total = total + alpha[:, k : k + 1] * (Z[k] - 1 if deviation else Z[k])
    if form == "paper-normalised":
        return total / alpha.sum(-1, keepdim=True)
    if form == "authors" and S is not None:
        return _normalised(S, total)
    return total


@torch.no_grad()
def undefined(Z: Tensor, alpha: Tensor, form: str, S: Tensor | None = None) -> Tensor:
    """(B,) bool: the rows of ``alpha`` whose mixture divides by 0, give or take rounding.

    Σα of "paper-normalised" and Σ(σ⊙z) of "authors", against what they are without signs: a
    quotient by what rounding left over would be noise. Not by a matrix product: autocast and TF32
    would round it.
    """
    if form == "authors" and S is not None:
        norms, sizes = (Z * S).sum(-1), (Z.abs() * S).sum(-1)
        # Any z is the base of a zero matrix.
        matters = S.sum() > 0
    elif form == "paper-normalised":
        norms = sizes = Z.new_ones(())
        matters = norms > 0
    else:
        return torch.zeros(alpha.shape[0], dtype=torch.bool, device=alpha.device)
    left, size = (alpha * norms).sum(-1).abs(), (alpha.abs() * sizes).sum(-1)
    return matters & (left <= _CANCELLED * size)
