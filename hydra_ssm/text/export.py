"""Models as programs that run without this library, for any batch and length: torch.export and ONNX."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental import _config as tracing

from .._extras import imports_unannounced, require
from ..matrices.attention import Attention
from ..matrices.low_rank import LowRank
from ..matrices.semiseparable import Triangles
from ..mixer import MatrixMixer
from .config import HydraConfig
from .inference import load
from .messages import quiet
from .models import HydraPreTrainedModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # (batch, length) int64 each
OUTPUTS = {
    "HydraForMaskedLM": ("logits",),
    "HydraForSequenceClassification": ("logits",),
    "HydraForTokenClassification": ("logits",),
    "HydraForQuestionAnswering": ("start_logits", "end_logits"),
    "HydraModel": ("last_hidden_state", "sentence_embedding"),
}
ANY_LENGTH = (Attention, LowRank, Triangles)  # matrices whose product is one program for all lengths
ANY = 1 << 31  # tokens or texts; more than will come
SHORTEST = 2  # a text without words is [CLS] [SEP]
UNSEEN = ((1, 2), (1, 129), (3, 40))  # batches and lengths that an exported program is checked at


class Program(nn.Module):
    """A model as a function of its INPUTS, with a tuple of its OUTPUTS; an embedding is the mean of a text's tokens."""

    def __init__(self, model: HydraPreTrainedModel) -> None:
        super().__init__()
        if type(model).__name__ not in OUTPUTS:
            raise ValueError(f"what is exported must be one of {', '.join(OUTPUTS)}, got {type(model).__name__}")
        self.model = model
        self.outputs = OUTPUTS[type(model).__name__]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        found = dict(self.model(input_ids, attention_mask, token_type_ids))
        if "sentence_embedding" in self.outputs:
            h, mask = found["last_hidden_state"], attention_mask.bool()  # h is zero at padding
            found["sentence_embedding"] = h.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return tuple(found[name] for name in self.outputs)


@contextmanager
def evaluating(model: HydraPreTrainedModel) -> Iterator[Program]:
    """The model as a Program that draws no dropout; afterwards what of it was training goes on, and nothing else."""
    training = [module for module in model.modules() if module.training]
    try:
        yield Program(model).eval()
    finally:
        for module in training:
            module.training = True


def export(model: HydraPreTrainedModel) -> ExportedProgram:
    """The model, on the CPU, as a program of INPUTS for any batch and any length from SHORTEST on.

    Raises ValueError for a model of another kind, or with matrices that do not export with a dynamic length.
    """
    for mixer in model.modules():
        if isinstance(mixer, MatrixMixer) and not issubclass(mixer.matrix_class, ANY_LENGTH):
            raise ValueError(
                f"{mixer.matrix_class.__name__} does not export with a dynamic length: its product has its own"
            )
    longest = model.longest_document or ANY
    sizes = {0: Dim("batch", min=1, max=ANY), 1: Dim("length", min=SHORTEST, max=longest)}
    example = example_inputs(model.config, 2, min(70, longest - 1))
    try:
        # Without this, tracing would tell sizes of 1 from others, and refuse them.
        oblivious = tracing.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with torch.no_grad(), evaluating(model) as program, oblivious:
            return torch.export.export(program, example, dynamic_shapes=dict.fromkeys(INPUTS, sizes), strict=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        mixers = sorted({m.matrix_class.__name__ for m in model.modules() if isinstance(m, MatrixMixer)})
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"a model of {', '.join(mixers)} does not export with a dynamic length: {reason}") from error


def example_inputs(config: HydraConfig, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chance tokens for INPUTS, the same every time; the last row of several is padded."""
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, length - length // 3 :] = 0
    return ids, mask, torch.zeros_like(ids)


def write_torch(model: HydraPreTrainedModel, path: Path) -> None:
    """A file that `torch.export.load(path).module()` makes a function of INPUTS again. Errors as of `export`."""
    program = export(model)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of code and folders of this machine
    with path.open("wb") as stream:
        torch.export.save(program, stream)


def write_onnx(model: HydraPreTrainedModel, path: Path) -> None:
    """An ONNX file with INPUTS and the model's OUTPUTS. Errors as of `export`."""
    require("onnxscript", "export")
    axes = {name: {0: "batch", 1: "length"} for name in INPUTS}
    names = OUTPUTS[type(model).__name__]
    program = export(model)
    with imports_unannounced(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own ways
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, output_names=names, dynamic_shapes=axes, optimize=False
        )
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of code and folders of this machine, several times the weights
    made.save(path)


def write_int8(folder: Path, kind: type[HydraPreTrainedModel], out: Path) -> None:
    """A folder's model and tokenizer in another, which `from_pretrained` loads where torchao is installed.

    The matrices of linear layers are kept as int8 with a scale for each row, and multiply as float32. All else stays as
    it is, the embeddings and the decoder tied to them, classifiers, convolutions, norms, A_log, dt_bias and D.
    """
    with imports_unannounced():
        require("torchao", "export")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["decoder", "classifier"])
        model, tokenizer, lacks_head = load(folder, kind, dtype=torch.float32, quantization_config=config)
        if lacks_head:
            raise ValueError(f"{folder} must hold all of a {kind.__name__}, it lacks weights of its head")
        with quiet():
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)


def read_torch(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """What `write_torch` wrote, as a function of INPUTS."""
    with path.open("rb") as stream:
        return torch.export.load(stream).module()


def read_onnx(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """What `write_onnx` wrote, as a function of INPUTS that onnxruntime computes on the CPU."""
    session: Any = require("onnxruntime", "export").InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}
        return tuple(torch.from_numpy(found) for found in session.run(None, feed))

    return run


def difference(model: HydraPreTrainedModel, run: Callable[..., tuple[Tensor, ...]]) -> float:
    """The largest difference of a program's outputs from the model's, at batches and lengths that it has not seen."""
    worst = 0.0
    longest = model.longest_document or ANY
    for batch, length in UNSEEN:
        inputs = example_inputs(model.config, batch, min(length, longest))
        with torch.no_grad(), evaluating(model) as program:
            expected = program(*inputs)
        for found, wanted in zip(run(*inputs), expected, strict=True):
            worst = max(worst, (found - wanted).abs().nan_to_num(nan=math.inf).max().item())  # max() skips NaN
    return worst
