"""The cosine heatmap of latents and features."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..report.style import settings_text, wrapped_text

MOST_NUMBERED = 30  # rows or columns of a heatmap whose cells are wide enough for a number
# Its lightness falls all the way from -1 to 1, so that the sign shows in grey and to any eye.
_COSINES = LinearSegmentedColormap.from_list(
    "cosines", [(0, "#FFEFA8"), (0.5, "#D6D6D6"), (0.75, "#5B8DB8"), (1, "#04223F")]
)


def cosine_heatmap(title: str, measured: dict[str, Any], num_features: int) -> bytes:
    """Return a PNG of learned against true directions, the decoder's bias in a strip below.

    measured: what `toy.measure` returns. The heatmap's first `num_features` columns are features,
    the others composites.
    """
    heatmap = measured["heatmap"]
    cosines, bias = np.array(heatmap["cosines"]), np.array([heatmap["bias"]])
    rows, columns = cosines.shape
    numbered = max(rows, columns) <= MOST_NUMBERED
    cell = 0.3 if numbered else 8 / max(rows, columns)  # inches
    height, width = max(2.0, cell * rows), max(2.0, cell * columns)
    with settings_text():
        figure = Figure((width + 1.7, height + 1.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=[height, 0.25], sharex=True)
        for axes, values in ((upper, cosines), (lower, bias)):
            axes.grid(visible=False)
            image = axes.imshow(
                values, cmap=_COSINES, vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
            )
            if num_features < columns:
                axes.axvline(num_features - 0.5, color="black", linewidth=1)
            if numbered:
                _number_cells(axes, values)
        figure.colorbar(image, ax=[upper, lower], label="cosine similarity", aspect=5 * height)
        title = "\n".join(wrapped_text(title, round(9 * (width + 1)), 3))
        figure.suptitle(title, fontsize=8.5, parse_math=False)
        upper.set_ylabel("latent, in the order of matches")
        upper.tick_params(labelbottom=False)
        lower.set_yticks([0], [f"b_dec\nnorm {measured['b_dec_norm']:.2g}"])
        if numbered:
            dead = set(heatmap["dead"])
            upper.set_yticks(
                range(rows), [f"{n} dead" if n in dead else n for n in heatmap["latents"]]
            )
            names = [i if i < num_features else f"c{i - num_features}" for i in range(columns)]
            lower.set_xticks(range(columns), names)
        right = " | composites (c)" if num_features < columns else ""
        lower.set_xlabel(f"true features{right}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        return buffer.getvalue()


def _number_cells(axes: Any, values: Any) -> None:
    """Print the cosines that are not near zero; in black or white, whichever is legible."""
    for (row, column), value in np.ndenumerate(values):
        if abs(value) >= 0.05:
            text = f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")
            colour = "white" if value > 0.55 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
