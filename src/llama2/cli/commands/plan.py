"""`llama2 plan`: what a model takes on a machine, or a training run on many, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

import typer

from llama2 import plan as planning
from llama2.cli.options import Json
from llama2.cli.output import one_line
from llama2.config import ModelConfig
from llama2.console import data, say
from llama2.errors import HubError, PlanError
from llama2.formats import FLOATS
from llama2.machine import total_memory
from llama2.plan import GPUS, Machine
from llama2.speed import LIMIT_SECONDS

EXAMPLE = "Example: llama2 plan 70B --train --gpus 2048 --price 2"
_HERE = "here"


@dataclass(frozen=True)
class MachineOptions:
    """Which machine; a number that is given wins over a GPU's own, and is not measured."""

    on: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help=f"{_HERE}, which is measured as `llama2 bench` does, or {', '.join(GPUS)}.",
            show_default=f"{_HERE}, A100-80GB for training",
        ),
    ] = None
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of GPUs that share the model.", show_default="1")
    ] = None
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Memory of each, instead of its own.")] = None
    tflops: Annotated[float | None, typer.Option(metavar="X", help="10^12 operations a second of each, instead.")] = (
        None
    )
    bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", help="Speed of each memory, instead.")] = None
    watts: Annotated[float | None, typer.Option(metavar="W", help="Power of each, instead.")] = None


@dataclass(frozen=True)
class GenerationOptions:
    """What to generate with; None where nothing is given."""

    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Generation: F16, Q8_0, Q4_K_M, ... for the weights.",
            show_default="the file's own, F16 for a size",
        ),
    ] = None
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Generation: sequences at once.", show_default="1")
    ] = None


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; None where nothing is given, and then as `planning.TrainingRun` has it."""

    tokens: Annotated[
        float | None, typer.Option(metavar="N", help="Training: tokens in all.", show_default="2e12, the paper's")
    ] = None
    batch_tokens: Annotated[
        float | None,
        typer.Option(metavar="N", help="Training: tokens of a step.", show_default=str(planning.BATCH_TOKENS)),
    ] = None
    sequences: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Training: sequences at once on a GPU.", show_default="1")
    ] = None
    recompute: Annotated[
        bool | None,
        typer.Option("--recompute", help="Training: store layer inputs alone, recompute activations."),
    ] = None
    mfu: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Training: model FLOPs utilization.",
            show_default=f"{planning.MFU}, what the paper's four runs reached together",
        ),
    ] = None
    price: Annotated[float | None, typer.Option(metavar="X", help="Training: price of a GPU for an hour.")] = None
    pue: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Training: data-centre energy divided by GPU energy.",
            show_default=str(planning.PUE),
        ),
    ] = None
    intensity: Annotated[
        float | None,
        typer.Option(metavar="X", help="Training: kg of CO2eq a kWh.", show_default=str(planning.INTENSITY)),
    ] = None


def command(
    *,
    model: Annotated[
        str | None, typer.Argument(help=f"A size ({', '.join(planning.NAMED)}), or a model that is here.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of a sequence.", show_default="the model's own")
    ] = None,
    machine: MachineOptions,
    generation: GenerationOptions,
    train: Annotated[bool, typer.Option("--train", help="Plan a training run, not generation.")] = False,
    training: TrainingOptions,
    paper: Annotated[bool, typer.Option("--paper", help="Show the paper's GPU-hours and carbon beside ours.")] = False,
    as_json: Json = False,
) -> None:
    """Plan memory, FLOPs, time, cost, energy and carbon.

    Generation: memory of all sequences at the end of their context, and the least time that the machine's limits
    allow. `llama2 bench` measures which share of these limits is reached.

    Training (--train): AdamW in mixed precision, sharded over the GPUs.
    Hours = (6 * parameters * tokens + attention) / (operations a second * MFU).
    Energy = hours * watts. Carbon = energy * PUE * intensity.
    """
    if paper:
        _refuse("--paper", {"MODEL": model, "--context": context, "--train": train or None}, machine, generation)
        _refuse("--paper", {}, replace(training, mfu=None))
        record, lines = _paper(planning.MFU if training.mfu is None else training.mfu)
    elif model is None:
        raise typer.BadParameter("name a size or a model, or give --paper")
    elif train:
        _refuse("--train", {}, generation)
        record, lines = _train(model, context, machine, training)
    else:
        _refuse("generation; --train plans training", {}, training)
        record, lines = _generate(model, context, machine, generation)
    data(json.dumps(record)) if as_json else say("\n".join(lines))


def _generate(
    name: str, context: int | None, on: MachineOptions, options: GenerationOptions
) -> tuple[dict[str, Any], list[str]]:
    config, own = _model(name)
    gpus = on.gpus or 1
    if options.format is None and own is not None:
        formats, format = own, "its own formats"
    else:
        format = (options.format or "F16").upper()
        if format not in planning.FORMATS:
            raise typer.BadParameter(f"--format {options.format} is not one of {', '.join(planning.FORMATS)}")
        formats = planning.tensor_formats(config, format)
    context, batch = context or config.context_length, options.batch or 1
    planning.weight_bytes(config, formats)  # a format that does not go with the model is refused before measuring
    machine = _machine(on, _HERE, integers=not set(formats.values()) <= set(FLOATS))
    planned = planning.generation(config, formats, machine, context=context, batch=batch, devices=gpus)
    record = {
        **_header(name, config, machine, gpus, planned.memory),
        "format": format,
        "context": context,
        "batch": batch,
        "prefill_flops_per_token": planned.prefill_flops,
        "decode_flops_per_token": planned.decode_flops,
        "prefill_seconds": planned.prefill_seconds,
        "decode_step_seconds": planned.step_seconds,
        "decode_joules_per_token": planned.joules,
    }
    tokens, rate = batch * context, batch / planned.step_seconds
    prefill = f"prefill of {tokens:,} tokens, {tokens / planned.prefill_seconds:,.1f} tokens/s"
    decode = f"decode of {_count(batch, 'token')} at the context's end, {rate:,.1f} tokens/s"
    lines = [
        f"{one_line(name)}: {config.parameters():,} parameters in {format}, {_count(batch, 'sequence')} of {context:,} "
        f"tokens on {_title(machine, gpus)}",
        *_memory(planned.memory, machine, gpus),
        _row("FLOPs", f"{planned.prefill_flops / 1e9:,.2f} G", "for a token of prefill: 2 a weight, and attention"),
        _row("", f"{planned.decode_flops / 1e9:,.2f} G", "for the context's last token"),
        _row("at best", _time(planned.prefill_seconds), prefill),
        _row("", _time(planned.step_seconds), decode),
    ]
    if planned.joules is not None:
        lines.append(_row("energy", f"{planned.joules:,.2f} J", "for a token of decode, at full power"))
    return record, lines


def _train(
    name: str, context: int | None, on: MachineOptions, options: TrainingOptions
) -> tuple[dict[str, Any], list[str]]:
    config, _ = _model(name)
    gpus = on.gpus or 1
    machine = _machine(on, "A100-80GB", integers=False)
    if on.on == _HERE:
        machine = replace(machine, overhead=planning.TRAINER)
    given = {"products": on.on == _HERE} | {
        field: value for field, value in asdict(options).items() if value is not None
    }
    for whole in {"tokens", "batch_tokens"} & given.keys():
        if not 1 <= given[whole] <= 1e30:
            raise typer.BadParameter(f"--{whole.replace('_', '-')} {given[whole]} must be from 1 to 1e30")
        given[whole] = int(given[whole])
    settings = planning.TrainingRun(context=context or config.context_length, **given)
    planned = planning.training(config, machine, settings, gpus=gpus)
    record = {
        **_header(name, config, machine, gpus, planned.memory),
        **asdict(settings),
        **{field: value for field, value in asdict(planned).items() if field != "memory"},
    }
    flops = planned.matrix_flops + planned.attention_flops
    attention = config.causal_attention_flops(settings.context)
    formula = f"6 × {config.parameters():,} × {settings.tokens:.4g} tokens + 3 × {attention:,} of attention × tokens"
    lines = [
        f"{one_line(name)}: {settings.tokens:.4g} tokens in {planned.steps:,} steps of {settings.batch_tokens:,}, "
        f"sequences of {settings.context:,}, on {_title(machine, gpus)}",
        *_memory(planned.memory, machine, gpus),
        _row("FLOPs", f"{flops:.3e}", formula),
        _row(
            "time",
            f"{planned.gpu_hours:,.0f} h",
            f"of a GPU, {planned.days:,.1f} days, at an MFU of {settings.mfu:.1%}",
        ),
    ]
    if planned.cost is not None:
        lines.append(_row("cost", f"{planned.cost:,.0f}", f"at {settings.price:g} for a GPU and hour"))
    if planned.megawatt_hours is not None:
        source = f"of the GPUs at {machine.watts:g} W; × {settings.pue:g} in their data centre"
        lines += [
            _row("energy", f"{planned.megawatt_hours:,.2f} MWh", source),
            _row("carbon", f"{planned.tonnes:,.2f} t", f"of CO₂ equivalent, at {settings.intensity:g} kg a kWh"),
        ]
    return record, lines


def _paper(mfu: float) -> tuple[dict[str, Any], list[str]]:
    rows = planning.reproduce(mfu)
    record = {"mfu": mfu, "pue": planning.PUE, "intensity": planning.INTENSITY}
    lines = [
        "Llama 2's pretraining (paper, table 2) and ours: 2e12 tokens on A100-80GB",
        f"GPU-hours = (6 × parameters × tokens + attention) / (312 T/s × MFU of {mfu:.1%})",
        f"tCO2eq = GPU-hours × watts × PUE of {planning.PUE} × {planning.INTENSITY} kg a kWh",
        "",
        f"{'':5} {'GPU-hours':>10} {'ours':>10} {'off':>7}   {'tCO2eq':>7} {'of its hours, ours':>19} {'off':>7}"
        f"   {'of our hours':>12} {'off':>7}",
    ]
    for name, row in rows.items():
        hours, tonnes = row.paper_gpu_hours, row.paper_tonnes
        lines.append(
            f"{name:5} {hours:>10,} {row.gpu_hours:>10,.0f} {_off(row.gpu_hours, hours)}   {tonnes:>7.2f} "
            f"{row.tonnes_of_paper_hours:>19.2f} {_off(row.tonnes_of_paper_hours, tonnes)}   {row.tonnes:>12.2f} "
            f"{_off(row.tonnes, tonnes)}"
        )
    lines += ["", f"{'':5} {'MFU of its hours':>26}   {'without attention':>17}"]
    for name, row in rows.items():
        lines.append(f"{name:5} {row.paper_mfu:>26.1%}   {row.paper_mfu_6n:>17.1%}")
    return record | {"rows": {name: asdict(row) for name, row in rows.items()}}, lines


def _model(name: str) -> tuple[ModelConfig, Mapping[str, str] | None]:
    """A size that has a name, or a model's configuration and its tensors' formats. Raises PlanError, HubError."""
    sizes = {size.lower(): config for size, config in planning.NAMED.items()}
    if config := sizes.get(name.lower()):
        return config, None
    from llama2 import checkpoint
    from llama2.cli.local_models import local_path

    try:
        path = local_path(name)
    except HubError as error:
        raise PlanError(f"{error}; or a size: {', '.join(planning.NAMED)}") from error
    with checkpoint.open(path) as model:
        return model.config, {tensor.name: tensor.format for tensor in model.tensors.values()}


def _machine(on: MachineOptions, default: str, *, integers: bool) -> Machine:
    """The chosen machine, with numbers that are given; of this machine, the others are measured."""
    given: dict[str, Any] = {
        name: value * unit
        for name, value, unit in (
            ("memory", on.memory, 1e9),
            ("operations", on.tflops, 1e12),
            ("bandwidth", on.bandwidth, 1e9),
            ("watts", on.watts, 1),
        )
        if value is not None
    }
    name = (on.on or default).lower()
    if name != _HERE:
        gpus = {gpu.lower(): machine for gpu, machine in GPUS.items()}
        if name not in gpus:
            raise typer.BadParameter(
                f"--on {on.on} is neither {_HERE} nor one of {', '.join(GPUS)}; for another machine give --on {_HERE} "
                "with --memory, --tflops, --bandwidth and --watts"
            )
        return replace(gpus[name], **given)
    if "memory" not in given and (memory := total_memory()) is not None:
        given["memory"] = memory
    for name, rate in {
        "operations": "int8_gemm_rate" if integers else "fma_rate",
        "bandwidth": "read_bandwidth",
    }.items():
        if name not in given:
            from llama2 import native

            given[name] = getattr(native.module(), rate)(native.default_threads(), LIMIT_SECONDS)
    return Machine("this machine", **given, overhead=planning.PROCESS)


def _refuse(mode: str, given: Mapping[str, object], *groups: Any) -> None:
    """Raise typer.BadParameter when something is given that `mode` does not use."""
    for group in groups:
        given = {**given, **{f"--{f.name.replace('_', '-')}": getattr(group, f.name) for f in fields(group)}}
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise typer.BadParameter(f"{', '.join(unused)} does not apply to {mode}")


def _header(name: str, config: ModelConfig, machine: Machine, gpus: int, memory: Mapping[str, int]) -> dict[str, Any]:
    """The first fields of both plans' JSON."""
    total = sum(memory.values())
    return {
        "model": name,
        "parameters": config.parameters(),
        "machine": asdict(machine),
        "gpus": gpus,
        "memory_bytes": dict(memory),
        "total_memory_bytes": total,
        "fits": None if machine.memory is None else total <= machine.memory,
    }


def _title(machine: Machine, gpus: int) -> str:
    memory = "" if machine.memory is None else f"{machine.memory / 1e9:,.4g} GB, "
    rates = f"{machine.operations / 1e12:,.4g} T operations/s, {machine.bandwidth / 1e9:,.4g} GB/s"
    return f"{f'{gpus:,} × ' if gpus > 1 else ''}{machine.name} ({memory}{rates})"


def _memory(memory: Mapping[str, int], machine: Machine, gpus: int) -> list[str]:
    total = sum(memory.values())
    lines = [_row("" if i else "memory", _gb(size), part) for i, (part, size) in enumerate(memory.items())]
    each = "on each" if gpus > 1 else "in all"
    if machine.memory is None:
        return [*lines, _row("", _gb(total), f"{each}; give --memory to know whether that fits")]
    left = machine.memory - total
    verdict = f"fits, {_gb(left)} left" if left >= 0 else f"does not fit, {_gb(-left)} too much"
    return [*lines, _row("", _gb(total), f"{each}: {verdict}")]


def _row(title: str, value: str, what: str) -> str:
    return f"{title:8} {value:>14}  {what}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _off(ours: float, papers: float) -> str:
    return f"{ours / papers - 1:>+7.2%}"
