"""Where a feature is taken from: hook strings, what they stand for in a given model, and how they listen to it.

A hook string is `path[@tap]`. The path is dotted, with indices as `.3`, `[3]` or `[-2]`. The tap says which tensor of
that module: `out` (default), `out.<i>` of a tuple, `in.<i>` by place or `in.<name>` by the name of an argument.

Some names are established but exist in no public SAM-1 code, or name an embedding whose forward is never called. They
stand for these places, by component; without a hook string these are taken too:

encoder_patch       a ViT's `image_encoder.blocks[30]`: its last block but one, whatever its depth;
                    MobileSAM's `image_encoder.mv2_blocks[-2]`: `image_encoder.neck`
prompt_embed        `mask_decoder.twa_blocks[0]`: `mask_decoder.transformer.layers[0]`, the image on its way in or out
decoder_mask_token  `mask_decoder.mask_tokens`: `mask_decoder.transformer@out.0`
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

COMPONENTS = ("encoder_patch", "prompt_embed", "decoder_mask_token")
TAPS = {"input_keys": "in.keys", "output_keys": "out.1"}  # of prompt_embed
NUM_NEAR_MATCHES = 6

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[-?\d+\])*")
_TAP = re.compile(r"out(?:\.\d+)?|in\.\w+")
_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, eq=False)
class Hook:
    """A tensor of one module of a model.

    component: what it is taken for. asked: the hook string, or the name the default goes by. path: dotted, from the
    model to the module, with no negative indices. tap: see above. module: the one to listen to.
    """

    component: str
    asked: str
    path: str
    tap: str
    module: nn.Module

    def __str__(self) -> str:
        return self.path if self.tap == "out" else f"{self.path}@{self.tap}"

    @property
    def place(self) -> int | str | None:
        """What follows the dot of the tap."""
        _, _, place = self.tap.partition(".")
        return int(place) if place.isdigit() else place or None

    @property
    def before_prompts(self) -> bool:
        """Whether this is the image on its way into the first two-way block: the same for all points and boxes."""
        return self.tap == TAPS["input_keys"] and self.path.endswith(".0")

    def attach(self, listening: Callable[[], list[Tensor] | None]) -> RemovableHandle:
        """Add the tensor of every call to the list that `listening` gives; None: nobody listens now.

        The tensor itself, neither detached nor copied.
        """

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if (kept := listening()) is not None:
                kept.append(self._checked(self._of_inputs(args, kwargs)))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if (kept := listening()) is not None:
                kept.append(self._checked(self._of_output(output)))

        if self.tap.startswith("in"):
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(after)

    def _of_inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        place = self.place
        if isinstance(place, int):
            if place < len(args):
                return args[place]
            raise self._error(f"the module was called with {len(args)} inputs by place and {sorted(kwargs)} by name")
        if place in kwargs:
            return kwargs[place]
        names = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments
        if place in names:
            return names[place]
        raise self._error(f"the module was called with the inputs {', '.join(names)}")

    def _of_output(self, output: Any) -> Any:
        place = self.place
        if place is None:
            return output
        if isinstance(output, Tensor) or place >= len(output):
            found = "one tensor" if isinstance(output, Tensor) else f"{len(output)} values"
            raise self._error(f"the module returns {found}")
        return output[place]

    def _checked(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        hint = f"; take one of them with @out.0 to @out.{len(value) - 1}" if isinstance(value, tuple | list) else ""
        raise self._error(f"it gives a {type(value).__name__}, wanted a tensor{hint}")

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"the {self.component} hook '{self}' finds no tensor: {reason}")


def parse(text: str) -> tuple[str, str | None]:
    """Path and tap of a hook string; None: no tap given. ValueError if it is none."""
    path, at, tap = text.strip().partition("@")
    if not _PATH.fullmatch(path) or (at and not _TAP.fullmatch(tap)):
        raise ValueError(
            f"{text!r} is no hook; wanted path[@tap] such as 'image_encoder.blocks[-2]' or "
            "'mask_decoder.transformer.layers[0]@in.keys', with a tap out, out.<i>, in.<i> or in.<name>"
        )
    return path, tap if at else None


def resolve(
    model: nn.Module, component: str, hook: str | None, type: str | None = None, tap: str = "input_keys"
) -> Hook:
    """The place that a hook string means in this model, or, where there is none, the component's usual one.

    type: `vit_t` for MobileSAM, else a ViT. tap: for prompt_embed, `input_keys` for the image before it has met the
    prompts, `output_keys` for the image after the first block; a tap in the hook string goes before.
    ValueError, with near matches, if the model has no such place.
    """
    if component not in COMPONENTS:
        raise ValueError(f"no component {component!r} has a hook; there are {', '.join(COMPONENTS)}")
    if tap not in TAPS:
        raise ValueError(f"tap {tap!r} is unknown; choose one of {', '.join(TAPS)}")
    usual, usual_tap = _usual_places(component, type), TAPS[tap] if component == "prompt_embed" else None
    path, own_tap = (usual[0][0], None) if hook is None else parse(hook)
    if _steps(path) == _steps(usual[0][0]):  # an established name: as it stands if it can fire, else what it stands for
        candidates = [(place, own_tap or usual_tap or default) for place, default in usual]
        silent = (*_WITHOUT_FORWARD, nn.Embedding)
    else:
        candidates, silent = [(path, own_tap or "out")], _WITHOUT_FORWARD
    for place, place_tap in candidates:
        full_path, module = _find(model, place)
        if module is not None and not isinstance(module, silent):
            return Hook(component, hook or path, full_path, place_tap, module)
    raise ValueError(_not_found(model, component, hook, candidates, type))


def _usual_places(component: str, type: str | None) -> list[tuple[str, str]]:
    """The established name, then what it stands for: in our models, in those of transformers. Each with its tap."""
    if component == "encoder_patch" and type == "vit_t":
        return [("image_encoder.mv2_blocks[-2]", "out"), ("image_encoder.neck", "out")]
    return {
        "encoder_patch": [
            ("image_encoder.blocks[30]", "out"),
            ("image_encoder.blocks[-2]", "out"),
            ("vision_encoder.layers[-2]", "out"),
        ],
        "prompt_embed": [("mask_decoder.twa_blocks[0]", "in.keys"), ("mask_decoder.transformer.layers[0]", "in.keys")],
        "decoder_mask_token": [("mask_decoder.mask_tokens", "out"), ("mask_decoder.transformer", "out.0")],
    }[component]


def _steps(path: str) -> list[str]:
    return re.findall(r"\w+|-\d+", path)


def _find(model: nn.Module, path: str) -> tuple[str, nn.Module | None]:
    """The dotted path and its module; or, if there is none, None and the part of the path that does exist."""
    module, found = model, []
    for step in _steps(path):
        if isinstance(module, nn.ModuleList | nn.Sequential) and step.lstrip("-").isdigit():
            names = list(module._modules)
            step = names[int(step)] if -len(names) <= int(step) < len(names) else step
        child = getattr(module, step, None)
        if not isinstance(child, nn.Module):
            return ".".join(found), None
        module = child
        found.append(step)
    return ".".join(found), module


def _not_found(
    model: nn.Module, component: str, hook: str | None, candidates: list[tuple[str, str]], type: str | None
) -> str:
    kind = f"this {type} model" if type else "this model"
    asked = f"the {component} hook {hook!r}" if hook else f"the usual place of {component}"
    reasons = []
    for place, _ in candidates:
        found, module = _find(model, place)
        if module is not None:
            embedding = isinstance(module, nn.Embedding)
            what = "embedding, which is read and not called" if embedding else "list of modules, which cannot be called"
            reasons.append(f"'{place}' is {'an' if embedding else 'a'} {what}")
        else:
            owner = model.get_submodule(found) if found else model
            children = ", ".join(_shortened(list(owner._modules))) or "nothing"
            reasons.append(f"no '{place}', as '{found or kind}' holds {children}")
    names = [name for name, module in model.named_modules() if name and not isinstance(module, _WITHOUT_FORWARD)]
    wanted = ".".join(_steps(candidates[0][0]))
    near = difflib.get_close_matches(wanted, names, NUM_NEAR_MATCHES, cutoff=0.4)
    return f"{asked} cannot be found in {kind}: {'; '.join(reasons)}. Near matches: {', '.join(near) or 'none'}"


def _shortened(names: list[str]) -> list[str]:
    return names if len(names) <= 8 else [*names[:3], "...", names[-1]]
