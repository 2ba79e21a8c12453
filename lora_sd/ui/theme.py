"""How the page looks: paper, ink, and one red. All fonts are served from here."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes.utils import colors, sizes
from gradio.themes.utils.fonts import LocalFont

from lora_sd.data.report.html import STYLE as DATA_REPORT_STYLE
from lora_sd.ui import texts

STYLES = Path(__file__).parent  # style.css of the page, then each tab's own
RED = colors.Color(
    name="red", c50="#fdf3f0", c100="#fbe4dd", c200="#f6c6b9", c300="#efa08c", c400="#e67a60",
    c500="#d9553a", c600="#c4432a", c700="#a33521", c800="#7d2a1c", c900="#5a2016", c950="#38130d",
)  # fmt: skip
PAPER = colors.Color(
    name="paper", c50="#faf9f6", c100="#f3f1ec", c200="#e6e2d9", c300="#d2ccc0", c400="#a49d91",
    c500="#777166", c600="#575249", c700="#403c35", c800="#292622", c900="#1c1a17", c950="#131210",
)  # fmt: skip
# The two factors of a low-rank matrix, one tall and one wide, make an L.
LOGO = (
    '<svg class="logo" viewBox="0 0 32 32" role="img" aria-label="lora_sd">'
    '<rect class="paper" width="32" height="32" rx="7"/>'
    '<rect class="down" x="8" y="6" width="5" height="15" rx="1"/>'
    '<rect class="up" x="8" y="22" width="16" height="5" rx="1"/></svg>'
)
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E"
    "%3Crect width='32' height='32' rx='7' fill='%231c1a17'/%3E"
    "%3Crect x='8' y='6' width='5' height='15' rx='1' fill='%23faf9f6'/%3E"
    "%3Crect x='8' y='22' width='16' height='5' rx='1' fill='%23d9553a'/%3E%3C/svg%3E"
)


def launch_options() -> dict[str, Any]:
    """Theme, styles and icon, for `Blocks.launch`."""
    theme = gr.themes.Base(
        primary_hue=RED,
        secondary_hue=PAPER,
        neutral_hue=PAPER,
        radius_size=sizes.radius_md,
        # Gradio 6.31's SemiBold files lack the Latin letters; its Bold ones are whole.
        font=[LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif"],
        font_mono=[LocalFont("IBM Plex Mono", (400, 700)), "ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="none",
        block_label_background_fill="white",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_900",
        block_title_text_weight="600",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_200",
        input_border_color_focus="*neutral_500",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="none",
        button_primary_background_fill="*neutral_900",
        button_primary_background_fill_hover="*neutral_700",
        button_primary_background_fill_dark="*neutral_100",
        button_primary_background_fill_hover_dark="white",
        button_primary_border_color="*neutral_900",
        button_primary_border_color_dark="*neutral_100",
        button_primary_border_color_hover="*neutral_700",
        button_primary_text_color="white",
        button_primary_text_color_dark="*neutral_900",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        slider_color="*primary_500",
        slider_color_dark="*primary_500",
        loader_color="*primary_500",
    )
    head = (
        f'<link rel="icon" href="{ICON}">'
        f'<script>document.documentElement.lang = "{texts.chosen()}"</script>'
    )
    return {
        "theme": theme,
        "css": "".join(
            path.read_text(encoding="utf-8")
            for path in [STYLES / "style.css", *sorted(STYLES.glob("*/style.css"))]
        )
        + DATA_REPORT_STYLE,
        "head": head,
    }
