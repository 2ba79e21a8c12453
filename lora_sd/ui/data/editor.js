// The cards of pictures: captions are saved while they are written, a press on a picture shows it
// large, and Remove takes one out. Everything is asked of the app; a page of cards is never redrawn
// for an edit, so that nothing is lost that is being written. Where it is redrawn, Gradio keeps the
// elements and changes what is in them: a card may have become another picture's meanwhile.
const WAIT_MS = 900;
const waiting = new Map(), saving = new Set(), again = new Set();

const cardOf = (part) => part.closest("li");
const setOf = (part) => part.closest("ul").dataset;
const isChanged = (area) => area.value !== (area.dataset.before ?? area.defaultValue);

function tell(item, html) { item.querySelector(".told").innerHTML = html; }

async function ask(name, part, more = {}) {
  const { set, base } = setOf(part);
  try {
    return await server[name]({ data_set: set, base, picture: cardOf(part).dataset.name, ...more });
  } catch {
    return null;
  }
}

async function save(area) {
  clearTimeout(waiting.get(area));
  if (saving.has(area)) { again.add(area); return; }
  if (area.readOnly || !isChanged(area)) return;
  const item = cardOf(area), caption = area.value;
  saving.add(area);
  item.classList.add("saving");
  const before = area.dataset.before ?? area.defaultValue;
  const picture = item.dataset.name, { set } = setOf(area);
  const answer = await ask("save", area, { before, caption });
  saving.delete(area);
  item.classList.remove("saving");
  if (!area.isConnected || item.dataset.name !== picture || setOf(area).set !== set) return;
  tell(item, answer ? answer.told : props.unsaved);
  if (answer && answer.caption !== null) {
    area.dataset.before = answer.caption;
    if (answer.saved && area.value === caption && document.activeElement !== area) {
      area.value = answer.caption;
    }
  }
  if (answer && answer.saved) trigger("edited");
  if (again.delete(area)) save(area);
}

async function look(item) {
  const dialog = element.querySelector("dialog.large"), wasOpen = dialog.open;
  const html = await ask("look", item.querySelector(".look"));
  if (html === null || dialog.open !== wasOpen) return; // closed while the app was asked
  dialog.innerHTML = html;
  dialog.dataset.name = item.dataset.name;
  if (!dialog.open) dialog.showModal();
}

watch("value", () => {
  for (const area of element.querySelectorAll("textarea")) {
    if (area === document.activeElement && isChanged(area)) continue;
    delete area.dataset.before;
    area.value = area.defaultValue;
  }
});

element.addEventListener("input", ({ target }) => {
  if (!target.matches("textarea")) return;
  clearTimeout(waiting.get(target));
  waiting.set(target, setTimeout(() => save(target), WAIT_MS));
});
element.addEventListener("focusout", ({ target }) => target.matches("textarea") && save(target));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) element.querySelectorAll("textarea").forEach(save);
});

element.addEventListener("click", async ({ target }) => {
  if (target.matches("dialog")) target.close();
  const pressed = target.closest("button");
  if (pressed?.matches(".look")) look(cardOf(pressed));
  if (pressed?.matches(".remove")) {
    const item = cardOf(pressed);
    const answer = await ask("remove", pressed);
    if (!answer || answer.told) tell(item, answer ? answer.told : props.unsaved);
    else {
      item.className = "gone";
      item.innerHTML = answer.gone;
      trigger("edited");
    }
  }
});

element.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const dialog = element.querySelector("dialog.large[open]");
  if (!by || !dialog) return;
  const items = [...element.querySelectorAll("li[data-name]:not(.gone)")];
  const next = items[items.findIndex((one) => one.dataset.name === dialog.dataset.name) + by];
  if (next) look(next);
});
