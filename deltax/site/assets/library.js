// The reading list. Only the rows in view are in the page, so ten thousand scroll as ten do.
"use strict";
{
  const { rows, states } = dx.data();
  const list = document.getElementById("list"), holder = document.getElementById("rows");
  const ORDER = ["highest", "high", "medium", "normal", "low", "lowest"];
  const control = Object.fromEntries(["search", "state", "section", "order"].map((id) => [id, document.getElementById(id)]));
  for (const r of rows) r.words = `${r.title} ${r.name} ${r.tags.join(" ")} ${r.section} ${r.paper}`.toLowerCase();
  const byId = new Map(rows.map((r) => [r.id, r]));
  let shown = [], hits = null, height = 64, drawn = "";

  function choose() {
    const { search, state, section, order } = control;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const from = hits ? hits.map((id) => byId.get(id)).filter(Boolean) : rows;
    shown = from.filter((r) =>
      (state.value === "*" || r.state === state.value) && (section.value === "*" || r.section === section.value) &&
      (hits || words.every((w) => r.words.includes(w))));
    if (order.value === "date") shown = [...shown].sort((a, b) => (b.date > a.date) - (b.date < a.date));
    if (order.value === "priority") shown = [...shown].sort((a, b) => ORDER.indexOf(a.priority) - ORDER.indexOf(b.priority));
    if (order.value === "title") shown = [...shown].sort((a, b) => a.title.localeCompare(b.title));
    document.getElementById("count").textContent = shown.length < rows.length ? `${shown.length} of ${rows.length}` : "";
    drawn = "";
    draw();
  }

  function row(r, i) {
    const read = r.state === "done";
    const about = [r.section, r.date, r.due ? `due ${r.due}` : "", r.priority === "normal" ? "" : `${r.priority} priority`].filter(Boolean);
    const made = dx.make("div", { class: `row ${r.state || "plain"}`, role: "listitem", "data-id": r.id, "aria-posinset": i + 1, "aria-setsize": shown.length },
      dx.token
        ? dx.make("button", { type: "button", class: "tick", "aria-pressed": String(read), "aria-label": `${read ? "Mark as not read" : "Mark as read"}: ${r.title}` })
        : dx.make("i", { class: "tick", "aria-hidden": "true" }),
      dx.make("div", { class: "what" },
        dx.make("a", { href: `${dx.root}note/${r.id}.html` }, r.title),
        dx.make("p", { class: "muted" }, about.join(" · "),
          r.opening ? dx.make("span", { class: "opening" }, (about.length ? " · " : "") + r.opening) : null,
          ...r.tags.slice(0, 6).map((t) => dx.make("span", { class: "tag" }, `#${t}`)))),
      r.paper ? dx.make("a", { class: "badge paperlink", href: `${dx.root}paper/${r.paper}.html` }, r.paper) : null,
      dx.make("span", { class: "statewords muted" }, states[r.state]));
    made.style.top = `${i * height}px`;
    return made;
  }

  function draw() {
    const box = list.getBoundingClientRect();
    const first = Math.max(0, Math.floor(-box.top / height) - 8);
    const last = Math.min(shown.length, Math.ceil((innerHeight - box.top) / height) + 8);
    const state = `${first} ${last} ${shown.length}`;
    if (state === drawn) return;
    drawn = state;
    list.style.height = `${shown.length * height}px`;
    const focused = document.activeElement?.closest?.(".row")?.dataset.id;
    holder.replaceChildren(...shown.slice(first, last).map((r, i) => row(r, first + i)));
    if (focused) holder.querySelector(`[data-id="${focused}"] .tick`)?.focus({ preventScroll: true });
  }

  const find = dx.later(120, async () => {
    const query = control.search.value.trim();
    hits = null;
    if (query && dx.token) {
      try {
        const found = await dx.ask(`api/search?q=${encodeURIComponent(query)}`);
        if (control.search.value.trim() === query) hits = found.ids;
      } catch (error) { dx.say(error.message); }
    }
    choose();
  });

  if (rows.length) {
    control.search.addEventListener("input", find);
    for (const id of ["state", "section", "order"]) control[id].addEventListener("change", choose);
    addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    new ResizeObserver(() => { height = innerWidth < 640 ? 84 : 64; drawn = ""; draw(); }).observe(document.body);
    holder.addEventListener("click", async (event) => {
      const tick = event.target.closest("button.tick");
      if (!tick) return;
      const r = byId.get(Number(tick.closest(".row").dataset.id));
      const before = r.state;
      r.state = before === "done" ? "todo" : "done";
      drawn = "";
      draw();
      try {
        await dx.send(`api/note/${r.id}`, { state: r.state });
        dx.say(`${r.title}: ${states[r.state]}`);
      } catch (error) {
        r.state = before;
        drawn = "";
        draw();
        dx.say(error.message);
      }
    });
    choose();
  }
  document.documentElement.dataset.ready = "yes";
  performance.mark("dx-ready");
}
