// A paper's page: intervals drawn around zero, and the diff to its X where it was not known yet.
"use strict";
{
  for (const svg of document.querySelectorAll("svg.interval")) {
    const [low, high, estimate] = ["low", "high", "estimate"].map((name) => Number(svg.dataset[name]));
    const reach = 1.15 * Math.max(Math.abs(low), Math.abs(high), Number.MIN_VALUE);
    const x = (value) => 100 + (value / reach) * 96;
    const draw = (name, attributes) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      svg.append(made);
    };
    draw("line", { class: "zero", x1: 100, x2: 100, y1: 0, y2: 14 });
    draw("line", { class: "range", x1: x(low), x2: x(high), y1: 7, y2: 7 });
    draw("circle", { class: "middle", cx: x(estimate), cy: 7, r: 3.5 });
  }

  const wanted = document.querySelector("[data-wanted]");
  if (wanted && dx.token) {
    dx.ask(`api/diff/${wanted.dataset.wanted}`).then(
      (found) => {
        if (found.missing) {
          wanted.textContent = `No diff: ${found.missing}.`;
          return;
        }
        const line = ({ path, a, b }) => dx.make("tr", {},
          dx.make("th", { scope: "row" }, dx.make("code", {}, path)),
          dx.make("td", { class: "minus" }, dx.make("code", {}, a)),
          dx.make("td", { class: "plus" }, dx.make("code", {}, b)));
        wanted.replaceWith(dx.make("table", { class: "diff" },
          dx.make("caption", {}, dx.make("code", {}, found.command)), dx.make("tbody", {}, ...found.diff.map(line))));
      },
      (error) => { wanted.textContent = error.message; },
    );
  }
}
