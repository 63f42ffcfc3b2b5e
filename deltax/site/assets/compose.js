// Which deltas compose: all pairs as a table, and one delta's partners in words.
"use strict";
{
  function show(table) {
    const { keys, pairs, orders, reasons } = table;
    const outcome = (a, b) => pairs[`${a} ${b}`] ?? pairs[`${b} ${a}`];
    const only = (a, b) => {
      const [one, two] = `${a} ${b}` in pairs ? [a, b] : [b, a];
      const [first, then] = orders[`${one} ${two}`] === "backward" ? [two, one] : [one, two];
      return orders[`${one} ${two}`] ? ` ${table.base}+${first}+${then}` : null;
    };
    const matrix = document.getElementById("matrix"), select = document.getElementById("delta"), found = document.getElementById("found");
    const link = (key) => dx.make("a", { href: `${dx.root}paper/${key}.html` }, key);

    matrix.replaceChildren(
      dx.make("caption", {}, `${keys.length} deltas on ${table.base}`),
      dx.make("thead", {}, dx.make("tr", {}, dx.make("td"), ...keys.map((key) => dx.make("th", { scope: "col" }, dx.make("span", {}, key))))),
      dx.make("tbody", {}, ...keys.map((a) => dx.make("tr", {}, dx.make("th", { scope: "row" }, link(a)),
        ...keys.map((b) => {
          if (a === b) return dx.make("td", { class: "same" });
          const is = outcome(a, b);
          return dx.make("td", { class: `cell ${is}`, title: `${a}, ${b}: ${is}`, "data-a": a, "data-b": b });
        })))));
    matrix.addEventListener("click", (event) => {
      if (event.target.dataset.a) {
        select.value = event.target.dataset.a;
        tell();
      }
    });

    function tell() {
      const a = select.value;
      const group = (title, kinds, how) => {
        const keysOf = keys.filter((b) => b !== a && kinds.includes(outcome(a, b)));
        const reason = (b) => reasons[`${a} ${b}`] ?? reasons[`${b} ${a}`];
        return keysOf.length === 0 ? null : dx.make("section", {}, dx.make("h2", {}, title), dx.make("ul", {},
          ...keysOf.map((b) => dx.make("li", {}, link(b), how(b), reason(b) ? dx.make("p", { class: "muted" }, `${reason(b)}.`) : null))));
      };
      found.replaceChildren(...[
        group("Commutes", ["commutes"], () => ""),
        group("Composes", ["composes"], (b) => only(a, b) ?? ` ${table.base}+${a}+${b} is not ${table.base}+${b}+${a}`),
        group("Replaces", ["replaces"], (b) => only(a, b) ?? ""),
        group("Excludes", ["excludes"], () => ""),
      ].filter(Boolean));
    }

    select.replaceChildren(...keys.map((key) => dx.make("option", {}, key)));
    select.addEventListener("change", tell);
    if (keys.length) tell();
  }

  const missing = document.getElementById("missing"), table = dx.data();
  if (table) show(table);
  else {
    missing.hidden = false;
    if (dx.token) {
      dx.ask("api/compose").then((found) => { missing.hidden = true; show(found); }, (error) => { missing.textContent = error.message; });
    }
  }
}
