"""The cards of the Data set tab in a real browser: written on, removed, undone, nothing lost."""

from typing import Any

from browser import App, visit
from PIL import Image


def test_captions_are_written_on_cards_and_nothing_is_lost(app: App, browser: Any) -> None:
    cats = app.outputs / "datasets" / "cats"
    cats.mkdir(parents=True)
    for number, name in enumerate("abc"):
        Image.effect_noise((96, 64), 40 + number).save(cats / f"{name}.png")
        (cats / f"{name}.txt").write_text(f"caption {name}\n")
    me = visit(browser, app)
    page = me.page
    me.open_tab("Data set")
    me.choose("data-set", "cats (3 pictures)")

    def caption(name: str):
        return page.locator(f'.cards [data-name="{name}.png"] textarea')

    def value_is(name: str, value: str) -> None:
        page.wait_for_function(
            "([name, value]) => document.querySelector("
            '`.cards [data-name="${name}.png"] textarea`)?.value === value',
            arg=[name, value],
        )

    # saved while it is written, and when it is left
    caption("a").fill("a red cat")
    page.locator('[data-name="a.png"] .saved').wait_for(state="attached")
    assert (cats / "a.txt").read_text() == "a red cat\n"
    caption("b").fill("a  blue cat")
    page.keyboard.press("Tab")
    value_is("b", "a blue cat")
    assert (cats / "b.txt").read_text() == "a blue cat\n"

    # what was written elsewhere meanwhile is told, not overwritten
    (cats / "c.txt").write_text("from elsewhere\n")
    caption("c").fill("from here")
    page.locator('[data-name="c.png"]').get_by_text("“from elsewhere”").wait_for()
    assert (cats / "c.txt").read_text() == "from elsewhere\n"
    caption("c").fill("from here, again")
    page.locator('[data-name="c.png"] .saved').wait_for(state="attached")
    assert (cats / "c.txt").read_text() == "from here, again\n"

    # looked at, removed, and all of it undone: the cards say what the files say
    page.get_by_role("button", name="Look at b.png").click()
    page.locator("dialog[open]").get_by_text("96 x 64 pixels").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Remove a.png").click()
    page.locator(".cards .gone").wait_for()
    assert not (cats / "a.png").exists()
    for told in ("'a.png' removed", "caption of 'c.png'", "caption of 'b.png'"):
        page.locator("#data-undo").get_by_text(told).wait_for()
        page.locator("#data-undo").click()
        page.locator("#data-told").get_by_text(f"Taken back: {told}").wait_for()
    value_is("c", "from elsewhere")
    value_is("b", "caption b")
    value_is("a", "a red cat")
    assert me.saw_nothing_wrong()
