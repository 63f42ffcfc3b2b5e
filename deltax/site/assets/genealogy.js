// The front page's graph: zoom, search, filters, and tracing where a paper comes from and what came of it.
"use strict";
{
  const { papers, years, lanes, standings } = dx.data();
  const byKey = new Map(papers.map((p) => [p.key, p]));
  for (const p of papers) p.children = [];
  for (const p of papers) for (const parent of p.parents) byKey.get(parent).children.push(p.key);
  for (const p of papers) {
    p.words = `${p.key} ${p.key.replaceAll("-", " ")} ${p.title} ${p.sentence} ${p.year}`.toLowerCase();
    p.weight = reach(p, "children").size;
  }
  const world = {
    width: Math.max(1, ...years.map(([, x, w]) => x + w)),
    height: Math.max(1, ...lanes.map(([, y, rows]) => y + rows + 1)),
  };
  const GUTTER = 104, TOP = 34, BOTTOM = 6;
  const svg = d3.select("#graph");
  const node = svg.node();
  let width = 0, height = 0, transform = d3.zoomIdentity, narrow = false;

  const bands = svg.append("g").attr("class", "bands");
  const grid = svg.append("g").attr("class", "grid");
  const edges = svg.append("g").attr("class", "edges");
  const dots = svg.append("g").attr("class", "dots");
  const names = svg.append("g").attr("class", "names").attr("aria-hidden", "true");
  const axis = svg.append("g").attr("class", "axis").attr("aria-hidden", "true");

  const band = bands.selectAll("rect").data(lanes).join("rect").attr("class", (_, i) => (i % 2 ? "odd" : "even"));
  const tick = grid.selectAll("line").data(years.filter(([, , w]) => w > 0.5)).join("line");
  const links = papers.flatMap((p) => p.parents.map((parent) => ({ from: byKey.get(parent), to: p })));
  const edge = edges.selectAll("path").data(links).join("path");
  const dot = dots.selectAll("a").data(papers).join((enter) => {
    const a = enter.append("a")
      .attr("href", (p) => `${dx.root}paper/${p.key}.html`)
      .attr("class", (p) => `node ${p.standing}${p.read === "done" ? " ring" : ""}`)
      .attr("data-key", (p) => p.key)
      .attr("tabindex", (_, i) => (i ? -1 : 0))
      .attr("aria-label", (p) => `${p.key}, ${p.year}. ${p.sentence} ${standings[p.standing]}.${p.read === "done" ? " Read." : ""}`);
    a.append("circle").attr("class", "reach").attr("r", 11);
    a.append("circle").attr("class", "ringed").attr("r", (p) => radius(p) + 3);
    a.append("circle").attr("class", "mark").attr("r", radius);
    a.append("text").attr("dy", "0.34em").attr("x", (p) => radius(p) + 4).text((p) => p.key);
    return a;
  });
  const laneName = names.selectAll("text").data(lanes).join("text").text(([field]) => field);
  axis.append("rect").attr("class", "ground");
  const yearName = axis.selectAll("text").data(years.filter(([, , w]) => w > 0.5)).join("text").text(([year]) => year);
  dot.select("text").each(function (p) { p.length = p.key.length * 6.3 + 6; });

  const zoom = d3.zoom().scaleExtent([1, 14])
    .filter((event) => (event.type !== "wheel" || event.ctrlKey || event.metaKey || transform.k > 1) && !event.button)
    .on("zoom", (event) => { transform = event.transform; draw(); });
  svg.call(zoom).on("dblclick.zoom", null);
  node.addEventListener("dblclick", (event) => svg.transition().duration(still() ? 0 : 250).call(zoom.scaleBy, 2, d3.pointer(event)));

  function radius(p) { return 3.4 + Math.min(4, Math.sqrt(p.weight) * 0.55); }
  function still() { return matchMedia("(prefers-reduced-motion: reduce)").matches; }
  function left() { return narrow ? 8 : GUTTER; }
  const X = (x) => transform.applyX(left() + (x / world.width) * (width - left() - 60));
  const Y = (y) => transform.applyY(TOP + ((y + 0.5) / world.height) * (height - TOP - BOTTOM));

  function size() {
    const box = node.parentElement.getBoundingClientRect();
    narrow = box.width < 640;
    width = Math.max(box.width, 320);
    const wanted = world.height * (narrow ? 14 : 20) + TOP + BOTTOM;
    height = Math.max(400, Math.min(wanted, innerHeight - (narrow ? 160 : 330)));
    svg.attr("viewBox", `0 0 ${width} ${height}`).attr("height", height);
    zoom.extent([[0, 0], [width, height]]).translateExtent([[0, 0], [width, height]]);
    draw();
  }

  function draw() {
    band.attr("x", 0).attr("width", width).attr("y", ([, y]) => Y(y - 0.5)).attr("height", ([, y, rows]) => Y(y + rows + 0.5) - Y(y - 0.5));
    tick.attr("x1", ([, x]) => X(x)).attr("x2", ([, x]) => X(x)).attr("y1", TOP - 6).attr("y2", height);
    for (const p of papers) { p.px = X(p.x); p.py = Y(p.y); }
    edge.attr("d", ({ from, to }) => {
      const bend = Math.max(16, Math.abs(to.px - from.px) * 0.45);
      return `M${from.px},${from.py}C${from.px + bend},${from.py} ${to.px - bend},${to.py} ${to.px},${to.py}`;
    });
    dot.attr("transform", (p) => `translate(${p.px},${p.py})`);
    laneName.attr("x", narrow ? 5 : 12).attr("y", ([, y, rows]) => (narrow ? Y(y - 0.5) + 9 : (Y(y - 0.5) + Y(y + rows + 0.5)) / 2))
      .attr("dy", narrow ? 0 : "0.34em");
    axis.select("rect").attr("x", 0).attr("width", width).attr("y", 0).attr("height", TOP - 6);
    let last = -99;
    yearName.attr("x", ([, x, w]) => Math.max((X(x) + X(x + w)) / 2, 17)).attr("y", 18).attr("hidden", function ([, x, w]) {
      const middle = (X(x) + X(x + w)) / 2;
      if (middle < left() - 10 || middle - last < 36) return "";
      last = middle;
      return null;
    });
    label();
  }

  /** Names where there is room: traced and found papers first, then those from which most descends. */
  function label() {
    const taken = [];
    const cell = new Map();
    const near = (box) => {
      for (let row = Math.floor(box.y / 14) - 1; row <= Math.floor(box.y / 14) + 1; row++) {
        for (const other of cell.get(row) ?? []) {
          if (box.x < other.x + other.w && other.x < box.x + box.w && Math.abs(box.y - other.y) < 12.5) return true;
        }
      }
      return false;
    };
    const put = (box) => {
      const row = Math.floor(box.y / 14);
      if (!cell.has(row)) cell.set(row, []);
      cell.get(row).push(box);
      taken.push(box);
    };
    for (const p of papers) if (!p.off) put({ x: p.px - 4, y: p.py, w: 8, key: p.key });
    const order = [...papers].sort((a, b) => (b.near ?? 0) - (a.near ?? 0) || (a.off ?? 0) - (b.off ?? 0) || b.weight - a.weight);
    for (const p of order) {
      const box = { x: p.px + radius(p) + 4, y: p.py, w: p.length };
      const inside = p.px > -20 && p.px < width + 20 && p.py > -20 && p.py < height + 20;
      p.named = inside && !p.off && box.x + box.w < width + 8 && !near(box);
      if (p.named) put(box);
    }
    dot.classed("named", (p) => p.named);
  }

  function reach(paper, way) {
    const found = new Set();
    const front = [...paper[way]];
    while (front.length) {
      const key = front.pop();
      if (found.has(key) || key === paper.key) continue;
      found.add(key);
      front.push(...byKey.get(key)[way]);
    }
    return found;
  }

  const hint = [...document.getElementById("card").childNodes];
  let traced = null;
  function trace(paper) {
    if (traced === paper) return;
    traced = paper;
    const card = document.getElementById("card");
    svg.classed("tracing", Boolean(paper));
    if (!paper) {
      for (const p of papers) p.near = 0;
      dot.classed("up", false).classed("down", false).classed("self", false);
      edge.classed("up", false).classed("down", false);
      card.replaceChildren(...hint);
      label();
      return;
    }
    const up = reach(paper, "parents"), down = reach(paper, "children");
    for (const p of papers) p.near = p === paper ? 2 : up.has(p.key) || down.has(p.key) ? 1 : 0;
    dot.classed("self", (p) => p === paper).classed("up", (p) => up.has(p.key)).classed("down", (p) => down.has(p.key));
    const within = (set, key) => key === paper.key || set.has(key);
    edge.classed("up", (l) => within(up, l.from.key) && within(up, l.to.key))
      .classed("down", (l) => within(down, l.from.key) && within(down, l.to.key));
    card.replaceChildren(
      dx.make("p", { class: "sentence" }, paper.sentence),
      dx.make("div", {},
        dx.make("p", {}, dx.make("code", {}, paper.key), ` · ${paper.field} · ${paper.year}`),
        dx.make("p", { class: "muted" }, paper.title),
        dx.make("p", { class: "counts" }, dx.make("span", { class: "up" }, `${up.size} ancestor${up.size === 1 ? "" : "s"}`), " · ",
          dx.make("span", { class: "down" }, `${down.size} descendant${down.size === 1 ? "" : "s"}`))),
    );
    label();
  }

  // One stop for the Tab key; arrows go to the nearest paper in that direction.
  function go(paper) {
    dot.attr("tabindex", (p) => (p === paper ? 0 : -1));
    const found = dot.filter((p) => p === paper).node();
    found.focus({ preventScroll: true });
    if (paper.px < 0 || paper.px > width || paper.py < 0 || paper.py > height - BOTTOM) {
      svg.call(zoom.translateBy, (width / 2 - paper.px) / transform.k, (height / 2 - paper.py) / transform.k);
    }
  }
  dot.on("pointerenter", (event, p) => { if (event.pointerType !== "touch") trace(p); })
    .on("pointerleave", () => trace(document.activeElement?.closest?.(".node") ? d3.select(document.activeElement).datum() : null))
    .on("focus", (_, p) => trace(p)).on("blur", () => trace(null))
    .on("keydown", (event, p) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") { node.focus(); trace(null); return; }
      if (!way) return;
      event.preventDefault();
      let best = null, least = Infinity;
      for (const other of papers) {
        const [x, y] = [other.px - p.px, other.py - p.py];
        const along = x * way[0] + y * way[1], aside = Math.abs(x * way[1]) + Math.abs(y * way[0]);
        const far = along + 2.5 * aside;
        if (other !== p && !other.off && along > 1 && far < least) [best, least] = [other, far];
      }
      if (best) go(best);
    });

  const search = document.getElementById("search");
  const choice = Object.fromEntries(["field", "standing", "read"].map((id) => [id, document.getElementById(id)]));
  const rows = new Map([...document.querySelectorAll("#papers > li")].map((li) => [li.dataset.key, li]));

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [field, standing, read] = ["field", "standing", "read"].map((id) => choice[id].value);
    let shown = 0;
    for (const p of papers) {
      const fits = words.every((w) => p.words.includes(w)) && (!field || p.field === field) &&
        (!standing || p.standing === standing || p.marks.includes(standing)) &&
        (!read || (read === "done" ? p.read === "done" : read === "open" ? p.read !== null && p.read !== "done" : p.read === null));
      p.off = fits ? 0 : 1;
      shown += fits;
      rows.get(p.key).hidden = !fits;
    }
    dot.classed("off", (p) => p.off).attr("aria-hidden", (p) => (p.off ? "true" : null));
    edge.classed("off", (l) => l.from.off || l.to.off);
    svg.classed("filtered", shown < papers.length);
    document.getElementById("count").textContent = shown < papers.length ? `${shown} of ${papers.length}` : "";
    label();
    const kept = new URLSearchParams();
    if (search.value) kept.set("q", search.value);
    for (const id of ["field", "standing", "read"]) if (choice[id].value) kept.set(id, choice[id].value);
    history.replaceState(null, "", `#${kept}`);
  }
  search.addEventListener("input", dx.later(60, filter));
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    filter();
    const key = search.value.trim().toLowerCase().replaceAll(" ", "-");
    const best = byKey.get(key) ?? papers.filter((p) => !p.off).sort((a, b) => b.weight - a.weight)[0];
    if (best) go(best);
  });
  for (const id of ["field", "standing", "read"]) choice[id].addEventListener("change", filter);

  const step = (call, ...args) => svg.transition().duration(still() ? 0 : 250).call(call, ...args);
  document.getElementById("closer").addEventListener("click", () => step(zoom.scaleBy, 1.6));
  document.getElementById("farther").addEventListener("click", () => step(zoom.scaleBy, 1 / 1.6));
  document.getElementById("fit").addEventListener("click", () => step(zoom.transform, d3.zoomIdentity));

  size();
  new ResizeObserver(size).observe(node.parentElement);
  const asked = new URLSearchParams(location.hash.slice(1));
  search.value = asked.get("q") ?? "";
  for (const id of ["field", "standing", "read"]) if (asked.get(id)) choice[id].value = asked.get(id);
  if (search.value || Object.values(choice).some((c) => c.value)) filter();
  if (byKey.has(asked.get("paper"))) go(byKey.get(asked.get("paper")));
  document.documentElement.dataset.ready = "yes";
  performance.mark("dx-ready");
}
