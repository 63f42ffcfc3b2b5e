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

  const arm = (tag, ended) => (a) => dx.make("div", { class: "arm", "data-title": a.title },
    dx.make(tag, {}, dx.make("code", {}, a.title), dx.make("span", { class: "muted" }, a.done ? ` ${a.done} finished${ended}` : "")),
    dx.make("ul", { class: "runs" }, ...a.runs.map(run)));

  const plan = (p) => dx.make("section", { class: "ongoing", "data-plan": p.plan },
    dx.make("h3", {}, dx.make("code", {}, p.title)),
    dx.make("p", { class: "muted" }, `${p.done} of about ${p.runs} runs done, at ${p.scale}`),
    ...p.arms.map(arm("h4", "")));

  function show(state) {
    live.hidden = state.plans.length + state.arms.length === 0;
    arms.replaceChildren(...state.plans.map(plan), ...state.arms.map(arm("h3", " this hour")));
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
