# SPDX-License-Identifier: BSD-3-Clause
"""report.md: the tables, the plots and the advice as one page."""

from __future__ import annotations

from pathlib import Path

from . import tables
from .advice import choice, limits
from .results import Results
from .tables import Table


def markdown(table: Table) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"

    rows = [line(table.columns), "|" + " --- |" * len(table.columns), *map(line, table.rows)]
    note = f"\n\n{table.note.strip()}" if table.note else ""
    return f"**{table.title}**\n\n" + "\n".join(rows) + note


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _image(plots: dict[str, str], key: str, caption: str) -> str:
    return f"![{caption}]({plots[key]})\n\n*{caption}*"


def _swish(results: Results) -> str:
    found = results.activations
    assert found is not None
    limit = found.limits
    return (
        f"Largest distance on the plotted range: Swish at beta 0 to x/2: {limit.beta_0_to_half_x:.1e} (the guide says"
        " 'linear x'; the sigmoid's 1/2 stays); at beta 1 to SiLU:"
        f" {limit.beta_1_to_silu:.1e}; at beta {limit.large_beta:g} to ReLU: {limit.large_beta_to_relu:.1e}."
        f" The guide's tanh form of GELU is within {found.gelu_tanh_to_gelu:.1e} of the exact one."
    )


def _machine(results: Results) -> str:
    lines = [f"{key}: {', '.join(v) if isinstance(v, list) else v}" for key, v in results.machine.items()]
    seconds = ", ".join(f"{stage} {spent:.0f}" for stage, spent in results.seconds.items())
    return bullets([*lines, f"seconds per stage: {seconds}"])


def write(results: Results, plots: dict[str, str], path: Path) -> None:
    settings = results.settings
    text = results.text
    rate = f"{settings.learning_rate:g}"
    sections = [
        "# Feed-forward layers compared\n",
        "Written by `python -m ffn_ops compare`; the raw figures are in `results.json`.\n",
        "## Advice for choosing\n",
        "From this run's figures:\n",
        bullets(choice(results)) + "\n",
        markdown(tables.advice_table(results)) + "\n",
        "### What this run does not support\n",
        bullets(limits(results)) + "\n",
        "## Training\n",
        f"Text: {text.name}, {text.train_bytes:,} bytes for training, {text.validation_bytes:,} for validation. Model:"
        f" {settings.model.layers} blocks, d_model {settings.model.d_model}, context {settings.model.context} bytes,"
        f" batch {settings.batch}; AdamW, peak learning rate {rate}, gradients clipped at norm 1. All fused.\n",
        markdown(tables.training_table(results)) + "\n",
        markdown(tables.seeds_table(results)) + "\n",
        _image(plots, "loss", "Validation loss and its paired differences, while training and at the end") + "\n",
        _image(plots, "gradients", "Gradient norm of each block's feed-forward layer, mean over seeds") + "\n",
        "## Dead or alive after training\n",
        markdown(tables.dead_table(results)) + "\n",
        _image(
            plots, "dead", "Share of dead units at the training rate and at the stress rate; at 0 the lines coincide"
        )
        + "\n",
        "## Mixtures of experts\n",
        markdown(tables.mixtures_table(results)) + "\n",
        markdown(tables.routers_table(results)) + "\n",
        _image(plots, "mixtures", "Validation loss of the mixtures beside the dense layer of equal active FLOPs")
        + "\n",
        markdown(tables.loads_table(results)) + "\n",
        _image(plots, "experts", "Load of the experts: lines in training, dots in evaluation, where BASE balances none")
        + "\n",
        "## Fused, eager, torch.compile\n",
        markdown(tables.layers_table(results)) + "\n",
        _image(plots, "speed", "Time of one layer by provider; bars: quartiles") + "\n",
        _image(plots, "memory", "Memory kept for backward by provider") + "\n",
        "## Parameters and FLOPs\n",
        markdown(tables.counts_table(results)) + "\n",
        markdown(tables.counted_table(results)) + "\n",
        "The guide writes GLU, GeGLU and SwiGLU as `act(x W1) W2 * (x W3)`, which multiplies width d_model by d_ff;"
        " counted and run is `(act(x W1) * (x W3)) W2`. No reading gives the lookup table's 2.0x for GLU; its 4.0x for"
        " Gated-FFN is the layer without the projection that the 9.5M and 4.5x include.\n",
        "## Activation functions\n",
        _image(plots, "activations", "Activation functions and their derivatives (autograd through ffn_ops)") + "\n",
        _image(plots, "swish", "Swish for several beta and its derivatives") + "\n",
        _swish(results) + "\n",
        markdown(tables.activations_table(results)) + "\n",
        "## Machine\n",
        _machine(results) + "\n",
    ]
    path.write_text("\n".join(sections), encoding="utf-8")
