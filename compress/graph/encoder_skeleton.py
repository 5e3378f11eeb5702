"""An encoder's graph without weights: transformers' own model on the meta device through ``torch.onnx`` (dynamo).

No weight is ever allocated: the model lives on torch's meta device, the exporter sees shapes only, and initializers
come out as references to external data that does not exist. Attention is traced in its plain spelling (``eager``),
which the rewrite rules of ``graph/rules`` know; ``position_ids`` are computed in the graph instead of being sliced from
a buffer, which would have no value here.
"""

from __future__ import annotations

from typing import Any

from compress.graph import kept_heads
from compress.tasks import Task, load_task

#: What onnxruntime 1.14 and later, its mobile packages and transformers.js all run.
OPSET = 18
#: The example's shape. The exporter would take a size of 1 for a constant.
_EXAMPLE = {"batch_size": 2, "sequence_length": 16}


def write(config_directory: str, output: str, task_name: str) -> None:
    """Export the model of ``config.json`` for a task, and write its graph without weights."""
    import onnx_ir as ir
    import onnxscript.optimizer
    import torch
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    task = load_task(task_name)
    config = AutoConfig.from_pretrained(config_directory, trust_remote_code=False, local_files_only=True)
    config.return_dict = True
    cls = TasksManager.get_model_class_for_task(_pipeline_name(task), framework="pt", model_type=config.model_type)
    with torch.device("meta"):
        model = cls.from_config(config, attn_implementation="eager").eval()
    if kept_heads.removed(config.to_dict()):
        kept_heads.narrow(model, kept_heads.described(config.to_dict(), type(model).__name__))
    examples = _examples(config)
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.onnx.export(
            _named_outputs(model, task),
            (),
            kwargs=examples,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            output_names=list(_outputs(task)),
            dynamic_shapes={name: {0: free, 1: free} for name in examples},
        )
    assert program is not None
    graph = program.model.graph
    names = _parameter_names(model)
    for name, value in list(graph.initializers.items()):
        if name in names:
            value.const_value = None  # a meta tensor: the optimizer must not look into it
    onnxscript.optimizer.optimize(program.model)
    for name, value in list(graph.initializers.items()):
        if name in names:
            _leave_unwritten(graph, value, names[name])
    _name_axes(graph)
    ir.save(program.model, output)


def _parameter_names(model: Any) -> dict[str, str]:
    """Return the wrapper's name of every parameter with the model's own; a tied one has its first name twice."""
    first: dict[int, str] = {}
    return {
        f"model.{name}": first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _leave_unwritten(graph: Any, value: Any, name: str) -> None:
    """Turn a parameter into a reference to data that does not exist, under its name."""
    import onnx_ir as ir

    if name in graph.initializers:  # tied, and exported twice
        ir.convenience.replace_all_uses_with(value, graph.initializers[name])
        del graph.initializers[value.name]
        return
    value.name = name
    value.const_value = ir.ExternalTensor(
        location="not-written", offset=0, length=0, dtype=value.dtype, shape=value.shape, name=name
    )


def _outputs(task: Task) -> tuple[str, ...]:
    # Pooling is a choice of the profile: a rule adds it.
    return tuple(name for name in task.outputs if name != "sentence_embedding")


def _pipeline_name(task: Task) -> str:
    return "feature-extraction" if task.name == "embedding" else task.name


def _examples(config: Any) -> dict[str, Any]:
    """Return an example of every input, on the meta device."""
    from optimum.utils.input_generators import DummyTextInputGenerator
    from optimum.utils.normalized_config import NormalizedTextConfig

    generator = DummyTextInputGenerator("feature-extraction", NormalizedTextConfig(config), **_EXAMPLE)
    names = ["input_ids", "attention_mask"]
    # DistilBERT has no segments; every other family here reads which of two texts a token belongs to.
    if getattr(config, "type_vocab_size", 0):
        names.append("token_type_ids")
    return {name: generator.generate(name, framework="pt").to("meta") for name in names}


def _named_outputs(model: Any, task: Task) -> Any:
    """Wrap a model so that it returns the task's outputs in order."""
    import inspect

    import torch

    wants_positions = "position_ids" in inspect.signature(model.forward).parameters

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> tuple[Any, ...]:
            extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            if wants_positions:
                extra["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            result = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra)
            return tuple(result[name] for name in _outputs(task))

    return Wrapper().eval()


def _name_axes(graph: Any) -> None:
    """Give the free dimensions of inputs and outputs the names that every other exporter gives them."""
    import onnx_ir as ir

    first = graph.inputs[0].shape
    names = {str(first[0]): "batch_size", str(first[1]): "sequence_length"}
    for value in graph.inputs:
        value.shape = ir.Shape(["batch_size", "sequence_length"])
    for value in graph.outputs:
        value.shape = ir.Shape(
            [size if isinstance(size, int) else names.get(str(size), str(size)) for size in value.shape]
        )
