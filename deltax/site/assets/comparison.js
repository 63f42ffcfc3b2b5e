// Loss against what it cost: curves with bands over tokens, seconds and FLOPs; final scores over bytes held.
"use strict";
{
  const { rows, unit } = dx.data();
  const svg = d3.select("#chart"), caption = document.getElementById("caption");
  const colour = (i) => `s${i % 6}`;

  function draw(axis) {
    const width = Math.max(320, svg.node().parentElement.clientWidth), height = Math.max(260, Math.min(440, width * 0.5));
    const box = { left: 56, right: 18, top: 14, bottom: 40 };
    svg.attr("viewBox", `0 0 ${width} ${height}`).attr("height", height).selectAll("*").remove();
    const points = axis === "bytes";
    const series = rows.map((row, i) => ({
      row, i,
      curve: points
        ? row.scores.filter((s) => s !== null && row.bytes).map((s) => [row.bytes, s, s, s])
        : row.scale[axis] === null ? [] : row.curve.filter((p) => p.every((v) => v !== null)).map(([t, ...rest]) => [t * row.scale[axis], ...rest]),
    }));
    const all = series.flatMap((s) => s.curve);
    if (!all.length) {
      caption.textContent = `No figures for ${axis} were measured in this comparison.`;
      return;
    }
    const pad = (extent, share) => {
      const room = (extent[1] - extent[0] || Math.abs(extent[0]) || 1) * share;
      return [extent[0] - room, extent[1] + room];
    };
    const x = d3.scaleLinear(points ? pad(d3.extent(all, (p) => p[0]), 0.12) : [0, d3.max(all, (p) => p[0])], [box.left, width - box.right]);
    const late = points ? all : all.filter((p) => p[0] > 0.02 * d3.max(all, (q) => q[0]));
    const y = d3.scaleLinear(pad([d3.min(late, (p) => p[2]), d3.max(late, (p) => p[3])], 0.06), [height - box.bottom, box.top]);
    const form = (v) => dx.number(v) + (points ? "B" : "");
    const grid = svg.append("g").attr("class", "axis");
    grid.append("g").attr("transform", `translate(${box.left},0)`).call(d3.axisLeft(y).ticks(6).tickSize(-(width - box.left - box.right)));
    grid.append("g").attr("transform", `translate(0,${height - box.bottom})`).call(d3.axisBottom(x).ticks(width < 500 ? 4 : 8).tickFormat(form));
    svg.append("text").attr("class", "label").attr("x", width - box.right).attr("y", height - 6).attr("text-anchor", "end")
      .text(axis === "bytes" ? "most bytes held in a step" : axis === "tokens" ? "tokens trained on" : `training ${axis}`);
    svg.append("text").attr("class", "label").attr("x", box.left + 4).attr("y", 10).text(points ? unit : "nats");
    svg.append("clipPath").attr("id", "inside").append("rect").attr("x", box.left).attr("y", box.top)
      .attr("width", width - box.left - box.right).attr("height", height - box.top - box.bottom);
    const plot = svg.append("g").attr("clip-path", "url(#inside)");
    for (const { curve, i } of series) {
      if (points) {
        plot.append("g").attr("class", `points ${colour(i)}`).selectAll("circle").data(curve).join("circle")
          .attr("cx", (p) => x(p[0])).attr("cy", (p) => y(p[1])).attr("r", 4.5);
      } else {
        plot.append("path").attr("class", `band ${colour(i)}`).attr("d", d3.area().x((p) => x(p[0])).y0((p) => y(p[2])).y1((p) => y(p[3]))(curve));
        plot.append("path").attr("class", `curve ${colour(i)}`).attr("d", d3.line().x((p) => x(p[0])).y((p) => y(p[1]))(curve));
      }
    }
    caption.textContent = points
      ? "Each point is one pair's held-out score."
      : "Training loss: the mean over pairs, and a band from the lowest to the highest run.";
  }

  document.getElementById("key").replaceChildren(
    ...rows.map((row, i) => dx.make("li", {}, dx.make("i", { class: `swatch ${colour(i)}` }), dx.make("code", {}, row.name))));
  const chosen = () => document.querySelector("input[name=axis]:checked").value;
  for (const input of document.querySelectorAll("input[name=axis]")) input.addEventListener("change", () => draw(chosen()));
  new ResizeObserver(() => draw(chosen())).observe(svg.node().parentElement);
}
