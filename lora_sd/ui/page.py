"""The page: a header and its tabs, and what leads from one tab to another."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_sd.ui.adapters.events import wire_adapters_tab
from lora_sd.ui.adapters.handlers import AdapterHandlers
from lora_sd.ui.adapters.tab import build_adapters_tab
from lora_sd.ui.api import Api
from lora_sd.ui.bases import MODELS
from lora_sd.ui.compare.handlers import CompareHandlers
from lora_sd.ui.compare.tab import build_compare_tab
from lora_sd.ui.data.events import build_data_tab
from lora_sd.ui.data.handlers import DataHandlers
from lora_sd.ui.generate.events import wire_generate_tab
from lora_sd.ui.generate.handlers import GenerateHandlers
from lora_sd.ui.generate.tab import build_generate_tab
from lora_sd.ui.launch import Trainer
from lora_sd.ui.texts import say
from lora_sd.ui.theme import LOGO
from lora_sd.ui.train.handlers import TrainHandlers
from lora_sd.ui.train.tab import build_train_tab
from lora_sd.ui.workplace import Workplace

CACHE_CLEANED_EVERY_S = 3600
CACHE_KEPT_S = 24 * 3600
WARM_UP_AFTER_S = 3  # of an open page: its own start comes first


def build_page(
    outputs: Path, more_pictures: Path | None = None, models: Path | None = None
) -> gr.Blocks:
    """The whole page over a folder of runs.

    Args:
        outputs: the folder of all runs.
        more_pictures: a folder whose folders of pictures are offered beside the example.
        models: a folder whose checkpoints are offered as base models; None: models/ beside app.py.
    """
    place = Workplace(outputs, more_pictures, Trainer(outputs), models or MODELS)
    generating = GenerateHandlers(place)
    place.trainer.before_launch(generating.make_room)
    place.queue.start()
    with gr.Blocks(
        title="lora_sd",
        analytics_enabled=False,
        delete_cache=(CACHE_CLEANED_EVERY_S, CACHE_KEPT_S),
    ) as page:
        masthead = gr.HTML(
            f"<header>{LOGO}<div><h1>lora_sd</h1><p>{say('page.about')}</p></div></header>",
            elem_id="masthead",
        )
        with gr.Tabs(elem_id="tabs", selected="train") as tabs:
            with gr.Tab(say("page.data"), id="data") as data:
                data_tab = build_data_tab(DataHandlers(place))
            with gr.Tab(say("page.train"), id="train") as train:
                train_tab = build_train_tab(TrainHandlers(place))
            with gr.Tab(say("page.generate"), id="generate") as generate:
                generate_tab = build_generate_tab()
            with gr.Tab(say("page.adapters"), id="adapters") as adapters:
                adapters_tab = build_adapters_tab()
            with gr.Tab(say("page.compare"), id="compare") as compare:
                compare_tab = build_compare_tab(CompareHandlers(place))
        events = wire_generate_tab(generate_tab, generating)
        data.select(**data_tab.opened)
        train.select(**train_tab.opened)
        generate.select(**events.opened)
        adapters.select(**wire_adapters_tab(adapters_tab, AdapterHandlers(place)).opened)

        def show(tab: str) -> dict[str, Any]:
            """Arguments of the event that leads to a tab."""
            return {
                "fn": lambda: gr.update(selected=tab), "outputs": tabs, "show_progress": "hidden"
            }  # fmt: skip

        panel = train_tab.panel
        panel.use.click(**events.seen).then(**show("generate")).then(
            inputs=[panel.run, generate_tab.prompt], **events.choose
        )
        data_tab.train.click(**show("train")).then(outputs=train_tab.data_set, **data_tab.as_choice)
        train_tab.to_pictures.click(inputs=train_tab.data_set, **data_tab.choose).then(
            **show("data")
        )
        adapters_tab.use.click(**show("generate")).then(
            inputs=[adapters_tab.version, generate_tab.prompt], **events.choose_adapter
        )
        compare.select(**compare_tab.opened).then(**compare_tab.refresh)
        panel.compare.click(inputs=[panel.run, *compare_tab.chosen], **compare_tab.choose).then(
            **show("compare")
        )
        Api(place, generating).offer()
        page.load(**train_tab.loaded)
        page.load(**events.opened)
        page.load(**panel.refresh)
        page.unload(**events.left)
        soon = gr.Timer(WARM_UP_AFTER_S)

        def warm_up() -> dict[str, Any]:
            generating.warm_up()
            return gr.update(active=False)

        soon.tick(warm_up, None, soon, queue=False, show_progress="hidden")
    _spare_hidden_progress(page, masthead)
    return page


def _spare_hidden_progress(page: gr.Blocks, first: Component) -> None:
    """Let what shows no progress show it nowhere.

    At every event, Gradio's page writes the progress of every component that ever was the output of
    one, and looks for each through the whole page: a second of the browser's time at the start.

    Args:
        first: of the page's components: it is found at once.
    """
    for fn in page.fns.values():
        if fn.show_progress == "hidden":
            fn.show_progress_on = [first]
