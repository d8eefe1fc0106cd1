// Quality against cost and speed.

const HEIGHTS = { cost: 400, speed: 400, tokens: 300 }; // px
const MANY = 60; // series, beyond which a policy is one cloud of markers without intervals
const waiting = new Set(); // charts that take long and have not come into view

/** The Pareto front of points that have both values, by rising cost. */
function front(candidates, axis, metric) {
  const ordered = [...candidates].sort(
    (a, b) => axis.better * (b[axis.key] - a[axis.key]) || metric.better * (b[metric.key] - a[metric.key]),
  );
  const kept = [];
  for (const point of ordered) {
    if (!kept.length || metric.better * (point[metric.key] - kept.at(-1)[metric.key]) > 0) kept.push(point);
  }
  return kept.sort((a, b) => a[axis.key] - b[axis.key]);
}

function hover(point, axis, metric) {
  const written = [shown(point[metric.key], metric.write), interval(point, metric) && `(${interval(point, metric)})`];
  const range = axis.key === "speedup" ? interval(point, { key: "speedup", write: figure }) : "";
  return [
    `<b>${plain(label(point))}</b>${point.unreduced ? "" : `, asked ${plain(ratioName(point))}`}`,
    `${metric.name} ${written.filter(Boolean).join(" ")} ${metric.unit}`,
    `${figure(numberOf(point, axis))} ${range && `(${range}) `}${axis.unit}`,
  ].join("<br>");
}

/** Beside each other, the x of points that have almost the same cost: their intervals would cover each other. */
function dodged(drawn, axis) {
  const x = new Map(drawn.map((point) => [point, numberOf(point, axis)]));
  const ordered = [...drawn].sort((a, b) => x.get(a) - x.get(b));
  const range = x.get(ordered.at(-1)) - x.get(ordered[0]);
  let cluster = [];
  const part = () => {
    const step = Math.min(0.007, 0.04 / cluster.length) * range;
    cluster.sort((a, b) => a.policy.localeCompare(b.policy));
    const middle = (cluster.length - 1) / 2;
    cluster.forEach((point, place) => x.set(point, x.get(point) + (place - middle) * step));
    cluster = [];
  };
  for (const point of ordered) {
    if (cluster.length && x.get(point) - x.get(cluster.at(-1)) > 0.004 * range) part();
    cluster.push(point);
  }
  part();
  return x;
}

/** The ends of a figure's interval, or one standard deviation to both sides if the point is a mean over seeds. */
function endsOf(point, key) {
  const [value, sd] = [point[key], point[`${key}_sd`]];
  return sd == null ? (point[`${key}_ci`] ?? [null, null]) : [value - sd, value + sd];
}

function bars(ordered, key, scale, own) {
  const far = (side) =>
    ordered.map((point) => Math.max(0, scale * Math.abs((endsOf(point, key)[side] ?? point[key]) - point[key])));
  return { type: "data", symmetric: false, color: own, thickness: 1.2, width: 3, array: far(1), arrayminus: far(0) };
}

function tradeoff(axis, metric, colours, legend) {
  const drawn = visible.filter((point) => point[axis.key] != null && point[metric.key] != null);
  const traces = [];
  const measured = SPEEDS.includes(axis);
  const many = new Set(drawn.map((point) => point.series)).size > MANY;
  const place = measured || many || drawn.length < 2 ? null : dodged(drawn, axis);
  const along = (point) => place?.get(point) ?? numberOf(point, axis);
  const alike = (point) =>
    JSON.stringify([
      point.task,
      point.dataset,
      point.images + point.skipped.length, // figures over other images are not comparable
      (metric.relative || axis.relative) && point.backbone,
      measured && point.hardware,
    ]);
  // Runs are timed apart: their absolute speeds have no common front.
  const apart = measured && !axis.relative && new Set(drawn.map((point) => point.run)).size > 1;
  for (const [, members] of apart ? [] : groupBy(drawn, alike)) {
    const best = front(members, axis, metric);
    traces.push({
      x: best.map((point) => numberOf(point, axis)),
      y: best.map((point) => numberOf(point, metric)),
      mode: "lines",
      hoverinfo: "skip",
      name: "Pareto front",
      legendgroup: "front",
      showlegend: !traces.length,
      line: { color: colours.front, width: 5, shape: axis.better < 0 ? "hv" : "vh" },
      opacity: 0.55,
    });
  }
  const shapes = [],
    annotations = [];
  const bases = groupBy(
    drawn.filter((point) => point.unreduced),
    (point) => metric.write(point[metric.key]),
  );
  const several = new Set(drawn.map((point) => point.backbone)).size > 1 && !metric.relative;
  let widest = 10;
  for (const [written, members] of bases) {
    const y = numberOf(members[0], metric);
    shapes.push({
      type: "line",
      xref: "paper",
      x0: 0,
      x1: 1,
      y0: y,
      y1: y,
      line: { color: colours.soft, width: 1, dash: "dash" },
    });
    const names = several ? [...new Set(members.map((point) => point.backbone))] : [];
    const words = bases.size > 1 ? [`${written} ${names.join(", ")}`] : ["unreduced", written, ...names];
    widest = Math.max(widest, ...words.map((word) => Math.min(word.length, 30)));
    annotations.push({
      xref: "paper",
      x: 1,
      xanchor: "left",
      xshift: 4,
      y,
      align: "left",
      showarrow: false,
      text: words.map((word) => plain(word.length > 30 ? `${word.slice(0, 29)}…` : word)).join("<br>"),
      font: { size: 10, color: colours.soft },
    });
  }
  spread(annotations, drawn.map((point) => numberOf(point, metric)));
  const families = groupBy(drawn, (point) => point.policy);
  for (const [policy, family] of [...families].sort(([a], [b]) => a.localeCompare(b))) {
    for (const [, members] of groupBy(family, (point) => (many ? policy : point.series))) {
      const variant = many ? 0 : places.get(members[0].series);
      const ordered = [...members].sort(byCost);
      const own = colour(policy, colours);
      const open = variant || policy === "none";
      const [dash] = DASHES[variant % DASHES.length];
      traces.push({
        x: ordered.map(along),
        y: ordered.map((point) => numberOf(point, metric)),
        customdata: ordered.map((point) => point.id),
        text: ordered.map((point) => hover(point, axis, metric)),
        hovertemplate: "%{text}<extra></extra>",
        name: plain(label(ordered[0], drawn)),
        mode: many || ordered[0].unreduced ? "markers" : "lines+markers",
        line: { color: own, width: 1.6, dash },
        marker: {
          symbol: symbol(policy) + (open ? "-open" : ""),
          color: own,
          opacity: 1,
          size: many ? 7 : ordered.map((point) => (point.id === state.selected ? 16 : 10)),
          line: {
            color: open ? own : colours.paper,
            width: open ? 2 : 1,
          },
        },
        error_y: many ? undefined : bars(ordered, metric.key, metric.scale, own),
        error_x: many || axis.key !== "speedup" ? undefined : bars(ordered, axis.key, 1, own),
      });
    }
  }
  const spec = layout(axis.title, metric.axis, colours, legend, { shapes, annotations });
  spec.margin.r = 8 + 6 * widest;
  return { drawn, figure: { data: traces, layout: spec } };
}

/** Move labels of one line each apart that would cover each other; `values` are those that the axis spans. */
function spread(labels, values) {
  const perPixel = (1.1 * (Math.max(...values) - Math.min(...values)) || 1) / (HEIGHTS.cost - 70);
  const ordered = [...labels].sort((a, b) => a.y - b.y);
  let free = -Infinity;
  for (const label of ordered) {
    const at = Math.max(label.y / perPixel, free);
    label.yshift = at - label.y / perPixel;
    free = at + 13;
  }
}

function layout(x, y, colours, legend, more = {}) {
  const axis = (text) => ({
    title: { text, standoff: 8, font: { size: 13 } },
    gridcolor: colours.grid,
    zeroline: false,
    linecolor: colours.grid,
    automargin: true,
    ticks: "outside",
    tickcolor: colours.grid,
    fixedrange: matchMedia("(pointer: coarse)").matches,
  });
  return {
    paper_bgcolor: colours.paper,
    plot_bgcolor: colours.paper,
    hovermode: "closest",
    showlegend: legend,
    font: {
      family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
      size: 12,
      color: colours.ink,
    },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: { size: 11 } },
    margin: { l: 64, r: 72, t: 14, b: 56 }, // with less, Plotly widens them and draws the chart a second time
    xaxis: axis(x),
    yaxis: axis(y),
    hoverlabel: { align: "left", bgcolor: colours.paper, bordercolor: colours.front, font: { color: colours.ink } },
    ...more,
  };
}

/** The height of a picture with its legend below, px: Plotly fits the legend into the chart's height. */
function heightWithLegend(traces, width, chart) {
  const names = traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name);
  const widest = Math.max(0, ...names.map((name) => name.length)); // all columns have the width of the widest name
  const columns = Math.max(1, Math.floor((width - 130) / (7 * widest + 50)));
  return chart + 22 * Math.ceil(names.length / columns);
}

function chartSpec(kind, colours, legend) {
  if (kind === "tokens") return tokensSpec(colours, legend);
  if (kind === "training") return trainingSpec(colours, legend);
  const axes = kind === "cost" ? COSTS : SPEEDS;
  return tradeoff(
    axes.find((axis) => axis.key === state[kind]),
    metricNow(),
    colours,
    legend,
  );
}

/** The legend of policies with several lines; beyond MANY there are no lines. */
function drawLegend() {
  const series = groupBy(
    visible.filter((point) => !point.unreduced && point[state.metric] != null),
    (point) => point.series,
  );
  const ofPolicy = groupBy(
    [...series.values()].map(([point]) => point),
    (point) => point.policy,
  );
  byId("legend").replaceChildren(
    ...[...ofPolicy.values()]
      .filter((members) => members.length > 1 && series.size <= MANY)
      .flat()
      .map((point) => {
        const place = places.get(point.series);
        const line = svg("line", {
          x1: 0,
          x2: 28,
          y1: 6,
          y2: 6,
          stroke: colour(point.policy, theme()),
          "stroke-width": 2,
          "stroke-dasharray": DASHES[place % DASHES.length][1],
        });
        return h(
          "li",
          {},
          svg("svg", { viewBox: "0 0 28 12", class: "dash", "aria-hidden": "true" }, line),
          swatch(point.policy, place > 0),
          label(point, [...series.values()].flat()),
        );
      }),
  );
}

function erase(plot) {
  Plotly.purge(plot); // with its listeners
  delete plot.dataset.bound;
}

function drawChart(kind) {
  if (!window.Plotly || (waiting.has(kind) && !print.matches)) return; // the tables are drawn while it is unpacked
  const node = byId(kind);
  const plot = node.querySelector(".plot");
  const printing = print.matches;
  const {
    drawn,
    figure: { data: traces, layout: spec },
  } = chartSpec(kind, theme(), printing);
  const missing = visible.length - drawn.length;
  const axis = kind === "cost" ? "FLOPs" : "measured speed";
  const timed = kind !== "speed" || SPEEDS.some(({ key }) => visible.some((point) => point[key] != null));
  node.querySelector("figcaption").hidden = !timed;
  node.querySelector(".missing").textContent = !timed
    ? "No point shown was timed."
    : !["cost", "speed"].includes(kind) || !missing
      ? ""
      : `${missing} of ${visible.length} points not drawn: no ${axis} or no ${metricNow().name}.`;
  plot.hidden = !drawn.length;
  const wasEmpty = node.classList.contains("empty");
  node.classList.toggle("empty", !drawn.length);
  if (kind === "speed" && wasEmpty === !!drawn.length) erase(byId("cost").querySelector(".plot")); // its width changes
  if (!drawn.length) return erase(plot);
  if (printing) Object.assign(spec, { width: 680, height: heightWithLegend(traces, 680, 350) });
  else Object.assign(spec, { height: HEIGHTS[kind] ?? heightWithLegend(traces, plot.clientWidth, 280), width: undefined });
  Plotly.react(plot, traces, spec, { displayModeBar: false, responsive: true, doubleClick: "reset" });
  if (!plot.dataset.bound) {
    plot.on("plotly_click", (event) => showDetails(event.points[0].customdata));
    plot.dataset.bound = "true";
  }
}

/** Draw a chart when it is about to come into view: the schedules of a thousand results take as long as all others. */
function drawInView(kind) {
  waiting.add(kind);
  const observer = new IntersectionObserver(
    ([{ isIntersecting }]) => {
      if (!isIntersecting) return;
      observer.disconnect();
      waiting.delete(kind);
      drawChart(kind);
    },
    { rootMargin: "50%" },
  );
  observer.observe(byId(kind));
}

/** Costs last: without speeds they fill the row. */
function drawTradeoffs() {
  for (const kind of ["speed", "cost"]) drawChart(kind);
}

function buildFigure(kind, title, axes) {
  const choice =
    axes &&
    h(
      "select",
      {
        onchange: (event) => {
          state[kind] = event.target.value;
          remember();
          axes === COSTS || axes === SPEEDS ? drawTradeoffs() : drawChart(kind);
        },
      },
      axes.map((axis) => h("option", { value: axis.key, selected: axis.key === state[kind] }, axis.title)),
    );
  byId(kind).replaceChildren(
    h(
      "figcaption",
      {},
      h("label", {}, title ? h("span", {}, title) : null, choice),
      h(
        "span",
        { class: "actions" },
        ["SVG", "PNG"].map((format) =>
          h("button", { type: "button", onclick: () => saveChart(kind, format.toLowerCase()) }, format),
        ),
      ),
    ),
    h("div", { class: "plot" }),
    h("p", { class: "missing caption" }),
  );
}
