"""What others put around a model: torch.compile and PEFT.

A model is taken out of both. Parts that are compiled, or have an adapter beside their weights, are refused: what runs
there is not what the weights say.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from resid_surgery.errors import UnsupportedModelError


def unwrapped(module: nn.Module) -> nn.Module:
    """The language model inside what torch.compile and PEFT put around one: its own modules and tensors.

    Raises:
        UnsupportedModelError: PEFT puts virtual tokens before its prompts.
    """
    inner = module._modules.get("_orig_mod")
    if inner is None and callable(getattr(module, "get_base_model", None)) and hasattr(module, "peft_config"):
        for name, config in module.peft_config.items():  # type: ignore[operator, union-attr]
            if getattr(config, "is_prompt_learning", False):
                raise UnsupportedModelError(
                    f"{type(module).__name__} puts virtual tokens before every prompt (PEFT adapter {name!r}), which "
                    "stand for no token and no embedding. It is refused: load its base model."
                )
        inner = module.get_base_model()  # type: ignore[operator]
    return module if inner is None else unwrapped(inner)


def require_uncompiled(module: nn.Module, name: str) -> None:
    """Refuse parts that torch.compile replaced: what runs in them cannot be read."""
    for path, one in module.named_modules():
        if "_orig_mod" in one._modules or hasattr(one.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            raise UnsupportedModelError(
                f"{path or 'the forward'} of {name} was replaced by torch.compile, so its parts cannot be read. Pass "
                "the model as it was before, or compile in place: module.compile() leaves its parts as they are."
            )


@contextmanager
def naming_adapters(module: object) -> Iterator[None]:
    """In this block a model is refused with its active adapters named, where it has any.

    Raises:
        UnsupportedModelError: as it was raised, or naming them.
    """
    try:
        yield
    except UnsupportedModelError as error:
        paths = _adapted(module) if isinstance(module, nn.Module) else []
        if not paths:
            raise
        named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        raise UnsupportedModelError(
            f"{type(module).__name__} is refused with its adapters, which stand beside the weights of {named}: {error} "
            "Merge them first (PEFT's merge_adapter or merge_and_unload), or load the base model and take them as an "
            "edit: rs.Edit.from_peft(base, model)."
        ) from error


def _adapted(module: nn.Module) -> list[str]:
    """Paths of what PEFT adapts at this moment: neither merged nor switched off."""
    return [
        path
        for path, one in module.named_modules()
        if hasattr(one, "base_layer")
        and not getattr(one, "merged", True)
        and not getattr(one, "disable_adapters", True)
    ]
