// What trains now, told by the server as it changes.
"use strict";
{
  const live = document.getElementById("live"), arms = document.getElementById("arms");
  let known = null;

  function run(r) {
    const share = r.steps ? r.step / r.steps : 0;
    const loss = r.loss === null ? "" : ` · ${r.loss.toFixed(3)} nats`;
    const speed = r.speed ? ` · ${dx.number(r.speed)} tokens/s` : "";
    return dx.make("li", { "data-run": r.id },
      dx.make("span", { class: "seed" }, `seed ${r.seed}`),
      dx.make("progress", { max: 1, value: share, "aria-label": `seed ${r.seed}, step ${r.step} of ${r.steps}` }),
      dx.make("span", { class: "muted" }, `${r.step} of ${r.steps} steps${loss}${speed}`));
  }

  function show(state) {
    live.hidden = state.arms.length === 0;
    arms.replaceChildren(...state.arms.map((arm) => dx.make("div", { class: "arm", "data-title": arm.title },
      dx.make("h3", {}, dx.make("code", {}, arm.title), dx.make("span", { class: "muted" }, arm.done ? ` ${arm.done} finished this hour` : "")),
      dx.make("ul", { class: "runs" }, ...arm.runs.map(run)))));
    const names = state.comparisons.join(" ");
    if (known !== null && known !== names) location.reload();
    known = names;
  }

  if (live) {
    show(dx.data());
    const events = new EventSource(`${dx.root}events`);
    events.addEventListener("message", (event) => show(JSON.parse(event.data)));
  }
}
