"""Checkpoints of the released Hydra BERT as directories that transformers loads.

    released, after any prefix                        here
    bert.embeddings.word_embeddings.weight            model.embeddings.word_embeddings.weight
    bert.embeddings.token_type_embeddings.weight      model.embeddings.token_type_embeddings.weight
    bert.embeddings.position_embeddings.weight        model.embeddings.position_embeddings.weight, if there
    bert.embeddings.LayerNorm                         model.embeddings.norm
    bert.encoder.layer.I.[...]mixer.NAME              model.encoder.layers.I.mixer.NAME (see hydra_ssm.convert_block)
    bert.encoder.layer.I.[...]NORM, its only other    model.encoder.layers.I.norm
    cls.predictions.transform.dense, .LayerNorm       head.dense, head.norm
    cls.predictions.decoder.weight                    tied where it equals the embeddings, else decoder.weight
    cls.predictions.decoder.bias, .bias               decoder.bias

Sizes follow from shapes. A key that has no place and a parameter that gets no value are errors, never guesses.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..released import convert_block
from .config import HydraConfig
from .heads import HydraForMaskedLM

_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.(.+)")
_MIXER = re.compile(r"(?:.*\.)?mixer\.(.+)")
_NORM = re.compile(r"((?:.*\.)?[^.]*norm[^.]*)\.(weight|bias)", re.IGNORECASE)
_PLACES = {
    "bert.embeddings.word_embeddings": "model.embeddings.word_embeddings",
    "bert.embeddings.token_type_embeddings": "model.embeddings.token_type_embeddings",
    "bert.embeddings.position_embeddings": "model.embeddings.position_embeddings",
    "bert.embeddings.LayerNorm": "model.embeddings.norm",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions.decoder": "decoder",
}
_COMPUTED = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")  # buffers that BERT stores, not learned
_RELEASED_WORDS = "bert.embeddings.word_embeddings.weight"
_WORDS = "model.embeddings.word_embeddings.weight"


def convert_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    ngroups: int = 1,
    drop: Sequence[str] = (),
    skip_objects: bool = False,
    **fields: Any,
) -> HydraConfig:
    """Write the HF directory `out` from a released checkpoint; gives its configuration.

    The file is read as tensors alone: no code in it runs. It holds no tokenizer: save bert-base-uncased's to `out`.

    Args:
        checkpoint: a torch.save file with keys as above, nested or flat, behind any prefix such as state.model.model.
        out: the directory to make; it must not exist, or be empty.
        ngroups: groups of B and C, which shapes do not tell.
        skip_objects: leave out the Python objects that trainers save beside tensors, instead of refusing the file. They
            are replaced by empty ones, and no code runs.
        drop: patterns (* and ?) of keys to leave out, as above and without the prefix.
        fields: of HydraConfig, for what shapes do not tell, as layer_norm_eps. For ablation blocks `mixers`, with all
            that they need: mixers={"matrix": "low_rank", "d_state": 16}.

    Raises:
        ValueError: in one line, what the file lacks, or has and should not.
        OSError: it cannot be read, or `out` not written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} must not exist yet, or be an empty folder")
    released = {
        k: v for k, v in _model(_read(checkpoint, skip_objects)).items() if not any(fnmatchcase(k, p) for p in drop)
    }
    state, layers = _place(released)
    config = HydraConfig(**{**_sizes(state, layers, ngroups), "num_hidden_layers": len(layers), **fields})
    for i, (block, spec) in enumerate(zip(layers, config.layer_mixers, strict=True)):
        matrix = spec if isinstance(spec, str) else spec["matrix"]
        own = convert_block(block, "quasiseparable" if matrix == "hydra" else matrix)
        state |= {f"model.encoder.layers.{i}.mixer.{name}": value for name, value in own.items()}
    _save(_fill(config, state), out)
    return config


class _Nothing:
    """Stands in for a Python object of a checkpoint, whatever it is called with."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read(path: Path, skip_objects: bool) -> dict[str, Tensor]:
    """The tensors of a file by their dotted names."""
    with path.open("rb"):  # a file that cannot be read says so itself
        pass
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if skip_objects else []
        with torch.serialization.safe_globals([(_Nothing, name) for name in unknown]):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises any kind for a damaged file
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code and isinstance(error, UnpicklingError):
            way = "save its tensors alone" if skip_objects else "skip_objects leaves them out"
            what = f"holds Python objects ({code[1]}), which could run code: {way}"
        else:
            what = f"is not a whole PyTorch checkpoint ({type(error).__name__}: {_first_sentence(error)})"
        raise ValueError(f"{path} {what}") from None
    found = dict(_leaves(stored, ""))
    if not found:
        raise ValueError(f"{path} holds no named tensors")
    return found


def _first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]


def _leaves(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if not isinstance(value, Mapping):
        return []
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}.{key}" if name else str(key))]


def _model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors without their prefix; what has another prefix is an optimizer's and the like."""
    prefixes = [key.removesuffix(_RELEASED_WORDS) for key in tensors if key.endswith(_RELEASED_WORDS)]
    if len(prefixes) != 1:
        what = f"found it behind {sorted(prefixes)}" if prefixes else f"found {', '.join(sorted(tensors)[:3])}, ..."
        raise ValueError(f"the checkpoint must hold one model, with one {_RELEASED_WORDS}: {what}")
    return {key.removeprefix(prefixes[0]): value for key, value in tensors.items() if key.startswith(prefixes[0])}


def _place(released: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What lies outside the mixers under its name here, and each layer's mixer under its released names."""
    state: dict[str, Tensor] = {}
    layers: dict[int, dict[str, Tensor]] = {}
    lost: list[str] = []
    for key, value in released.items():
        module, _, leaf = key.rpartition(".")
        if layer := _LAYER.fullmatch(key):
            i = int(layer[1])
            if mixer := _MIXER.fullmatch(layer[2]):
                layers.setdefault(i, {})[mixer[1]] = value
            elif (norm := _NORM.fullmatch(layer[2])) and (
                name := f"model.encoder.layers.{i}.norm.{norm[2]}"
            ) not in state:
                state[name] = value
            else:
                lost.append(key)
        elif module in _PLACES:
            state[f"{_PLACES[module]}.{leaf}"] = value
        elif key != "cls.predictions.bias" and key not in _COMPUTED:
            lost.append(key)
    if lost:
        raise ValueError(f"the checkpoint has keys without a place here (drop them, if that is right): {_some(lost)}")
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ValueError(f"the layers must be numbered from 0 without a gap, got {sorted(layers)}")
    _place_decoder(state, released.get("cls.predictions.bias"))
    return state, [layers[i] for i in range(len(layers))]


def _place_decoder(state: dict[str, Tensor], bias: Tensor | None) -> None:
    """One bias from the two names that BERT has for it; the weight only where it is not tied."""
    if bias is not None and not torch.equal(state.setdefault("decoder.bias", bias), bias):
        raise ValueError("cls.predictions.bias and cls.predictions.decoder.bias must be equal, they differ")
    if "decoder.weight" in state and torch.equal(state["decoder.weight"], state[_WORDS]):
        del state["decoder.weight"]


def _sizes(state: Mapping[str, Tensor], layers: Sequence[Mapping[str, Tensor]], ngroups: int) -> dict[str, Any]:
    """Fields of HydraConfig from shapes."""
    words, types = state[_WORDS], state.get("model.embeddings.token_type_embeddings.weight")
    if types is None:
        raise ValueError("the checkpoint must hold bert.embeddings.token_type_embeddings.weight")
    found: dict[str, Any] = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "type_vocab_size": types.shape[0],
        "tie_word_embeddings": "decoder.weight" not in state,
        "dtype": words.dtype,
    }
    if (places := state.get("model.embeddings.position_embeddings.weight")) is not None:
        found |= {"position_embeddings": True, "max_position_embeddings": places.shape[0]}
    return found | _hydra_sizes(layers[0], ngroups)


def _hydra_sizes(layer: Mapping[str, Tensor], ngroups: int) -> dict[str, Any]:
    """Fields of HydraConfig from a Hydra layer; none from another block."""
    if not {"fc_D.weight", "out_proj.weight", "conv1d.weight"} <= layer.keys():
        return {}
    (nheads, inner), width = layer["fc_D.weight"].shape, layer["out_proj.weight"].shape[0]
    convolved, _, d_conv = layer["conv1d.weight"].shape
    rest = convolved - inner  # B and C of both directions
    if ngroups < 1 or rest % (4 * ngroups):
        raise ValueError(f"ngroups must divide the {rest // 4} numbers of a token's B, got {ngroups}")
    options: dict[str, Any] = {}
    if "in_proj.bias" in layer:
        options["bias"] = True
    if "conv1d.bias" not in layer:
        options["conv_bias"] = False
    if "init_states" in layer:
        options["learnable_init_states"] = True
    return {
        "d_state": rest // (4 * ngroups),
        "d_conv": d_conv,
        "expand": inner // width if inner % width == 0 else inner / width,
        "headdim": inner // nheads,
        "ngroups": ngroups,
        "mixers": {"matrix": "quasiseparable", **options} if options else "hydra",
    }


def _fill(config: HydraConfig, state: dict[str, Tensor]) -> HydraForMaskedLM:
    """The model with these tensors, not copies of them, for parameters."""
    with torch.device("meta"):
        model = HydraForMaskedLM(config)
    if config.tie_word_embeddings:
        state["decoder.weight"] = state[_WORDS]
    expected = model.state_dict()
    faults = {
        "has nothing for": expected.keys() - state.keys(),
        "has no place for": state.keys() - expected.keys(),
        "has another shape of": {n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape},
    }
    for fault, names in faults.items():
        if names:
            raise ValueError(f"the checkpoint {fault} parameters of the model it seems to be: {_some(names)}")
    model.load_state_dict({name: value.contiguous() for name, value in state.items()}, assign=True)
    model.tie_weights()
    return model


def _some(names: Collection[str]) -> str:
    """The first few of them."""
    first = ", ".join(sorted(names)[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"


def _save(model: HydraForMaskedLM, out: Path) -> None:
    """All of it or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        model.save_pretrained(Path(beside) / "model")
        (Path(beside) / "model").rename(out)
