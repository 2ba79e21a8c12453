"""The page: a header and its tabs."""

from pathlib import Path

import gradio as gr

from lora_sd.ui.generate_events import wire_generate_tab
from lora_sd.ui.generate_handlers import GenerateHandlers
from lora_sd.ui.generate_tab import build_generate_tab
from lora_sd.ui.launch import Trainer
from lora_sd.ui.theme import LOGO
from lora_sd.ui.train_handlers import TrainHandlers
from lora_sd.ui.train_tab import build_train_tab

CACHE_CLEANED_EVERY_S = 3600
CACHE_KEPT_S = 24 * 3600


def build_page(outputs: Path, more_pictures: Path | None = None) -> gr.Blocks:
    """The whole page over a folder of runs.

    Args:
        outputs: the folder of all runs.
        more_pictures: a folder whose folders of pictures are offered beside the example.
    """
    generating = GenerateHandlers(outputs)
    training = TrainHandlers(outputs, more_pictures, Trainer(outputs), generating.make_room)
    with gr.Blocks(
        title="lora_sd",
        analytics_enabled=False,
        delete_cache=(CACHE_CLEANED_EVERY_S, CACHE_KEPT_S),
    ) as page:
        gr.HTML(
            f"<header>{LOGO}<div><h1>lora_sd</h1><p>Teach Stable Diffusion a style or a subject: "
            "a few pictures in, one small file out.</p></div></header>",
            elem_id="masthead",
        )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train"):
                train_tab = build_train_tab(training)
            with gr.Tab("Generate", id="generate") as generate:
                generate_tab = build_generate_tab()
        events = wire_generate_tab(generate_tab, generating)
        generate.select(**events.opened)
        panel = train_tab.panel
        panel.use.click(**events.seen).then(
            lambda: gr.update(selected="generate"), None, tabs, show_progress="hidden"
        ).then(inputs=[panel.run, generate_tab.prompt], **events.choose)
        page.load(**events.opened)
        page.load(**panel.refresh)
        page.load(generating.warm_up, None, None, concurrency_id="pipeline", show_progress="hidden")
    return page
