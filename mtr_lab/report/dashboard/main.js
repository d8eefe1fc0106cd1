"use strict";
// Draws a report from its data block. Everything in that block is untrusted text: it becomes text nodes, never markup.
(() => {
  const ABSENT = "–";
  const percent = (value) => (100 * value).toFixed(1).replace("100.0", "100");
  const figure = (value) =>
    Math.abs(value) >= 99.95 ? value.toFixed(0) : value === 0 ? "0" : trimExponent(value.toPrecision(3));
  const nats = (value) => (Math.abs(value) < 1 ? value.toFixed(3) : value.toPrecision(3));
  const trimExponent = (text) => (text.includes("e") ? String(Number(text)) : text);
  const shown = (value, written) => (value == null ? ABSENT : written(value));

  // better: 1 if more is better, -1 if less is. own: whether it only means something for one backbone.
  const METRICS = [
    {
      key: "top1",
      name: "Top-1",
      axis: "Top-1 accuracy, %",
      latex: "Top-1 (\\%)",
      scale: 100,
      better: 1,
      write: percent,
    },
    {
      key: "top5",
      name: "Top-5",
      axis: "Top-5 accuracy, %",
      latex: "Top-5 (\\%)",
      scale: 100,
      better: 1,
      write: percent,
    },
    { key: "miou", name: "mIoU", axis: "Mean IoU, %", latex: "mIoU (\\%)", scale: 100, better: 1, write: percent },
    { key: "map", name: "AP", axis: "AP, %", latex: "AP (\\%)", scale: 100, better: 1, write: percent },
    { key: "ap50", name: "AP50", axis: "AP50, %", latex: "AP$_{50}$ (\\%)", scale: 100, better: 1, write: percent },
    {
      key: "agreement",
      name: "Agreement",
      axis: "Agreement with the unreduced model, %",
      latex: "Agreement (\\%)",
      scale: 100,
      better: 1,
      write: percent,
      own: true,
    },
    {
      key: "kl",
      name: "KL",
      axis: "KL to the unreduced model, nats an image",
      latex: "KL (nats)",
      scale: 1,
      better: -1,
      write: nats,
      own: true,
    },
  ];
  const COSTS = [
    { key: "flops_true", axis: "FLOPs an image, true, G", unit: "GFLOPs", scale: 1e-9, better: -1 },
    {
      key: "flops_literature",
      axis: "FLOPs an image as the literature counts, G",
      unit: "GFLOPs (lit.)",
      scale: 1e-9,
      better: -1,
    },
    { key: "reduction", axis: "FLOPs removed, achieved, %", unit: "% removed", scale: 100, better: 1 },
  ];
  const SPEEDS = [
    { key: "img_per_s", axis: "Images per second, measured", unit: "img/s", scale: 1, better: 1 },
    {
      key: "speedup",
      axis: "Speed relative to the same run unreduced, ×",
      unit: "× unreduced",
      scale: 1,
      better: 1,
      own: true,
    },
    { key: "p50", axis: "Latency of one image, median, ms", unit: "ms", scale: 1, better: -1 },
    { key: "p95", axis: "Latency of one image, 95th percentile, ms", unit: "ms (p95)", scale: 1, better: -1 },
    { key: "peak_mib", axis: "Peak memory, MiB", unit: "MiB", scale: 1, better: -1 },
  ];
  const FACETS = [
    { key: "task", name: "Task" },
    { key: "backbone", name: "Backbone" },
    { key: "dataset", name: "Dataset" },
    { key: "hardware", name: "Hardware" },
    { key: "policy", name: "Policy", of: (point) => (point.unreduced ? null : point.policy) },
    { key: "ratio", name: "Asked ratio", of: (point) => (point.unreduced ? null : ratioName(point)) },
  ];
  // Petroff, "Accessible color sequences for data visualization", arXiv 2107.02270; on dark ground two are lightened.
  const COLOURS = [
    "#3f90da",
    "#bd1f01",
    "#e08e00",
    "#832db6",
    "#1b8a6b",
    "#a96b59",
    "#e76300",
    "#8a7f45",
    "#717581",
    "#45a9b8",
  ];
  const ON_DARK = { "#bd1f01": "#ff6b4f", "#832db6": "#c084f0" };
  const SYMBOLS = {
    circle: null,
    square: "2,2 10,2 10,10 2,10",
    diamond: "6,0 12,6 6,12 0,6",
    "triangle-up": "6,1 11.5,11 0.5,11",
    "triangle-down": "6,11 0.5,1 11.5,1",
    pentagon: "6,0.5 11.7,4.7 9.5,11.4 2.5,11.4 0.3,4.7",
    cross: "4,0.5 8,0.5 8,4 11.5,4 11.5,8 8,8 8,11.5 4,11.5 4,8 0.5,8 0.5,4 4,4",
    hexagram: "6,0 7.8,3 11.2,3 9.5,6 11.2,9 7.8,9 6,12 4.2,9 0.8,9 2.5,6 0.8,3 4.2,3",
    x: "2.5,0.5 6,4 9.5,0.5 11.5,2.5 8,6 11.5,9.5 9.5,11.5 6,8 2.5,11.5 0.5,9.5 4,6 0.5,2.5",
    star: "6,0 7.5,4.1 11.8,4.2 8.4,6.8 9.6,11 6,8.6 2.4,11 3.6,6.8 0.2,4.2 4.5,4.1",
  };
  const DASHES = [
    ["solid", ""],
    ["dash", "6 4"],
    ["dot", "2 3"],
    ["dashdot", "6 3 2 3"],
    ["longdash", "10 4"],
  ]; // and as SVG has them
  const THEMES = {
    light: { paper: "#ffffff", ink: "#1d2126", soft: "#626b76", grid: "#e7e9ec", front: "#9aa3ad" },
    dark: { paper: "#191d22", ink: "#e6e9ec", soft: "#9aa4af", grid: "#2c333b", front: "#76818d" },
  };

  const byId = (id) => document.getElementById(id);
  const live = document.documentElement.dataset.live === "true";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const print = matchMedia("print");
  const styles = new Map(); // policy -> { colour, symbol }, given once
  const places = new Map(); // series -> how many of its policy came before it
  const state = {
    chosen: Object.fromEntries(FACETS.map((facet) => [facet.key, new Set()])),
    metric: null,
    cost: COSTS[0].key,
    speed: SPEEDS[0].key,
    baseline: null,
    selected: null,
    sort: { points: null, differences: null, runs: null },
  };
  let data, points, visible;

  // ------------------------------------------------------------------------------------------------ elements

  function h(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child != null));
    return node;
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  function swatch(policy, open = policy === "none") {
    const outline = SYMBOLS[style(policy).symbol];
    const own = colour(policy, theme());
    const paint = open ? { fill: "none", stroke: own, "stroke-width": 2 } : { fill: own };
    const shape = outline
      ? svg("polygon", { points: outline, ...paint })
      : svg("circle", { cx: 6, cy: 6, r: 4.8, ...paint });
    return svg("svg", { viewBox: "-1 -1 14 14", class: "swatch", "aria-hidden": "true" }, shape);
  }

  const theme = () => THEMES[dark.matches && !print.matches ? "dark" : "light"];

  function style(policy) {
    if (policy === "none") return { colour: null, symbol: "circle" };
    if (!styles.has(policy)) {
      const slot = styles.size;
      const names = Object.keys(SYMBOLS);
      styles.set(policy, {
        colour: COLOURS[slot % COLOURS.length],
        symbol: names[(slot + Math.floor(slot / COLOURS.length)) % names.length],
      });
    }
    return styles.get(policy);
  }

  function colour(policy, { ink, paper }) {
    const own = style(policy).colour;
    return own === null ? ink : paper === THEMES.dark.paper ? (ON_DARK[own] ?? own) : own;
  }

  // ------------------------------------------------------------------------------------------------ data

  function load(parsed) {
    data = parsed;
    points = data.points.map(({ run: r, point: i, places: alike, mean }) => {
      const run = data.runs[r];
      const point = mean ?? run.result.points[i]; // over seeds
      const speedups = (mean ? alike : [[r, i]]).map(([s, j]) => speedup(data.runs[s].result.points, j));
      return {
        ...point,
        id: `${run.name}#${i}`,
        run,
        places: alike,
        runs: alike.map(([index]) => data.runs[index]),
        result: point,
        task: run.result.task,
        backbone: run.result.backbone,
        dataset: run.result.dataset,
        hardware: run.hardware,
        variant: point.policy === "none" ? "" : run.variant,
        unreduced: point.policy === "none",
        p50: point.latency_ms?.p50,
        p95: point.latency_ms?.p95,
        speedup: speedups.includes(null) ? null : speedups.reduce((sum, value) => sum + value) / speedups.length,
      };
    });
    for (const point of points) point.series = seriesOf(point);
    for (const policy of [...new Set(points.map((point) => point.policy))].sort()) style(policy);
    for (const { policy, series } of points) {
      const before = [...places.keys()].filter((other) => JSON.parse(other)[0] === policy);
      if (!places.has(series)) places.set(series, before.length);
    }
    for (const facet of FACETS) {
      facet.values = [...new Set(points.map((point) => facetValue(facet, point)).filter((value) => value !== null))];
      facet.values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      for (const value of state.chosen[facet.key])
        if (!facet.values.includes(value)) state.chosen[facet.key].delete(value);
    }
  }

  function speedup(points, i) {
    const base = points.find((other) => other.policy === "none");
    return points[i].img_per_s && base?.img_per_s ? points[i].img_per_s / base.img_per_s : null;
  }

  const facetValue = (facet, point) => (facet.of ? facet.of(point) : point[facet.key]);
  const ratioName = (point) => (point.ratio == null ? "counts given" : `${figure(100 * point.ratio)} %`);
  const seriesOf = (point) =>
    JSON.stringify([point.policy, point.variant, point.backbone, point.dataset, point.task, point.hardware]);
  const isVisible = (point) =>
    FACETS.every((facet) => {
      const value = facetValue(facet, point);
      return value === null || !state.chosen[facet.key].size || state.chosen[facet.key].has(value);
    });
  const averaged = () => visible.some((point) => point.seeds);
  const byCost = (a, b) => (a.ratio ?? a.reduction ?? 0) - (b.ratio ?? b.reduction ?? 0);

  /** What sets a point apart from others of its policy: its variant, and the settings that are not the same for all. */
  function setting(point, among = visible) {
    const varies = (key) => among.some((other) => other[key] !== point[key]);
    const keys = ["backbone", varies("dataset") ? "dataset" : "task", "hardware"];
    const seeds = point.seeds && `mean of ${point.seeds.length} seeds`;
    return [point.variant, seeds, ...keys.filter(varies).map((key) => point[key])].filter(Boolean).join(" · ");
  }

  const label = (point, among = visible) =>
    [point.unreduced ? "unreduced" : point.policy, setting(point, among)].filter(Boolean).join(" · ");

  /** The interval over images; of a mean over seeds, the standard deviation over them. */
  function interval(point, metric, write = metric.write) {
    const sd = point[`${metric.key}_sd`];
    if (sd != null) return `± ${write(sd)}`;
    const ends = point[`${metric.key}_ci`];
    return ends && ends[0] != null && ends[1] != null && ends[0] !== ends[1]
      ? `${write(ends[0])} – ${write(ends[1])}`
      : "";
  }

  function numberOf(point, axis) {
    const value = point[axis.key];
    return value == null ? null : axis.scale * value;
  }

  // ------------------------------------------------------------------------------------------------ charts

  // Plotly reads a few tags in its texts.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function groupBy(items, key) {
    const groups = new Map();
    for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
    return groups;
  }

  /** The points no other is at least as good as in both, by rising cost value. */
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
    return [
      `<b>${plain(label(point))}</b>${point.unreduced ? "" : `, asked ${plain(ratioName(point))}`}`,
      `${metric.name} ${written.filter(Boolean).join(" ")}${metric.scale === 100 ? " %" : " nats"}`,
      `${figure(numberOf(point, axis))} ${axis.unit}`,
    ].join("<br>");
  }

  function tradeoff(axis, metric, colours, legend) {
    const drawn = visible.filter((point) => point[axis.key] != null && point[metric.key] != null);
    const traces = [];
    const alike = (point) =>
      JSON.stringify([
        point.task,
        point.dataset,
        point.images + point.skipped.length, // of fewer images the figures are of others
        (metric.own || axis.own) && point.backbone,
        SPEEDS.includes(axis) && point.hardware,
      ]);
    for (const [, members] of groupBy(drawn, alike)) {
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
    const several = new Set(drawn.map((point) => point.backbone)).size > 1 && !metric.own;
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
      widest = Math.max(widest, ...names.map((name) => name.length));
      annotations.push({
        xref: "paper",
        x: 1,
        xanchor: "left",
        xshift: 4,
        y,
        align: "left",
        showarrow: false,
        text: ["unreduced", written, ...names.map(plain)].join("<br>"),
        font: { size: 10, color: colours.soft },
      });
    }
    const families = groupBy(drawn, (point) => point.policy);
    for (const [policy, family] of [...families].sort(([a], [b]) => a.localeCompare(b))) {
      for (const [series, members] of groupBy(family, (point) => point.series)) {
        const place = places.get(series);
        const ordered = [...members].sort(byCost);
        const ends = (point) => {
          const [value, sd] = [point[metric.key], point[`${metric.key}_sd`]];
          return sd == null ? (point[`${metric.key}_ci`] ?? [null, null]) : [value - sd, value + sd];
        };
        const own = colour(policy, colours);
        const [dash] = DASHES[place % DASHES.length];
        traces.push({
          x: ordered.map((point) => numberOf(point, axis)),
          y: ordered.map((point) => numberOf(point, metric)),
          customdata: ordered.map((point) => point.id),
          text: ordered.map((point) => hover(point, axis, metric)),
          hovertemplate: "%{text}<extra></extra>",
          name: plain(label(ordered[0], drawn)),
          mode: ordered[0].unreduced ? "markers" : "lines+markers",
          line: { color: own, width: 1.6, dash },
          marker: {
            symbol: style(policy).symbol + (place || policy === "none" ? "-open" : ""),
            color: own,
            opacity: 1,
            size: ordered.map((point) => (point.id === state.selected ? 16 : 10)),
            line: {
              color: place || policy === "none" ? own : colours.paper,
              width: place || policy === "none" ? 2 : 1,
            },
          },
          error_y: {
            type: "data",
            symmetric: false,
            color: own,
            thickness: 1.2,
            width: 3,
            array: ordered.map((point) =>
              Math.max(0, metric.scale * ((ends(point)[1] ?? point[metric.key]) - point[metric.key])),
            ),
            arrayminus: ordered.map((point) =>
              Math.max(0, metric.scale * (point[metric.key] - (ends(point)[0] ?? point[metric.key]))),
            ),
          },
        });
      }
    }
    const spec = layout(axis.axis, metric.axis, colours, legend, { shapes, annotations });
    spec.margin.r = 8 + 6 * widest;
    return { drawn, figure: { data: traces, layout: spec } };
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
      margin: { l: 56, r: 72, t: 14, b: 52 },
      xaxis: axis(x),
      yaxis: axis(y),
      hoverlabel: { align: "left", bgcolor: colours.paper, bordercolor: colours.front, font: { color: colours.ink } },
      ...more,
    };
  }

  /** The height of a picture with its legend below, px: Plotly takes the legend's from the chart's. */
  function heightWithLegend(traces, width, chart) {
    const names = traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name);
    const widest = Math.max(0, ...names.map((name) => name.length)); // its columns are as wide as the widest name
    const columns = Math.max(1, Math.floor((width - 130) / (7 * widest + 50)));
    return chart + 22 * Math.ceil(names.length / columns);
  }

  const metricNow = () => METRICS.find((metric) => metric.key === state.metric);

  function chartSpec(kind, colours, legend) {
    if (kind === "tokens") return tokensSpec(colours, legend);
    const axes = kind === "cost" ? COSTS : SPEEDS;
    return tradeoff(
      axes.find((axis) => axis.key === state[kind]),
      metricNow(),
      colours,
      legend,
    );
  }

  /** One line for each distinct list of token counts, which points of equal schedules share. */
  function tokensSpec(colours, legend) {
    const traces = [],
      annotations = [],
      labelled = new Set();
    const drawn = visible.filter((point) => point.tokens.length);
    const lists = groupBy(drawn, (point) => JSON.stringify([point.backbone, point.tokens]));
    for (const [, members] of lists) {
      const policies = new Set(members.map((point) => point.policy));
      const names = members.map((point) => (point.unreduced ? label(point) : `${label(point)} at ${ratioName(point)}`));
      const own = policies.size === 1 ? colour(members[0].policy, colours) : colours.soft;
      const { tokens } = members[0];
      const listed = names.length > 12 ? [...names.slice(0, 11), `and ${names.length - 11} more`] : names;
      traces.push({
        x: [...tokens.keys(), tokens.length],
        y: [...tokens, tokens.at(-1)],
        mode: "lines",
        opacity: 0.8,
        name: plain(
          names.length > 3 ? `${names.slice(0, 2).join(", ")} and ${names.length - 2} more` : names.join(", "),
        ),
        line: { color: own, width: 1.6, shape: "hv", dash: members[0].unreduced ? "dash" : "solid" },
        customdata: [...tokens, 0].map(() => members[0].id),
        text: [...tokens, tokens.at(-1)].map((count) => `<b>${count} tokens</b><br>${listed.map(plain).join("<br>")}`),
        hovertemplate: "%{text}<extra></extra>",
      });
      const ends = [...new Set(members.map((point) => (point.unreduced ? "unreduced" : ratioName(point))))].join(", ");
      if (labelled.has(ends)) continue; // schedules of one ratio end close together
      labelled.add(ends);
      annotations.push({
        x: tokens.length,
        y: tokens.at(-1),
        xanchor: "left",
        xshift: 6,
        showarrow: false,
        font: { size: 11, color: colours.soft },
        text: plain(ends),
      });
    }
    const named = legend && traces.length <= 12; // beyond, the ratios at the ends of the lines have to do
    for (const trace of traces) trace.showlegend = named;
    const spec = layout("Block, counted from 0", "Tokens that enter it", colours, named, { annotations });
    spec.yaxis.rangemode = "tozero";
    spec.xaxis.tickformat = "d";
    spec.xaxis.range = [0, Math.max(1, ...drawn.map((point) => point.tokens.length))];
    return { drawn, figure: { data: traces, layout: spec } };
  }

  /** Which line is which, for policies that have several. */
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
        .filter((members) => members.length > 1)
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

  function drawChart(kind) {
    const node = byId(kind);
    const plot = node.querySelector(".plot");
    const printing = print.matches;
    const {
      drawn,
      figure: { data: traces, layout: spec },
    } = chartSpec(kind, theme(), printing);
    const missing = visible.length - drawn.length;
    const axis = kind === "cost" ? "FLOPs" : "measured speed";
    node.querySelector(".missing").textContent =
      kind === "tokens" || !missing
        ? ""
        : `${missing} of ${visible.length} points not drawn: no ${axis} or no ${metricNow().name}.`;
    plot.hidden = !drawn.length;
    if (!drawn.length) return Plotly.purge(plot);
    if (printing) Object.assign(spec, { width: 680, height: heightWithLegend(traces, 680, 350) });
    else Object.assign(spec, { height: kind === "tokens" ? 300 : 400, width: undefined });
    Plotly.react(plot, traces, spec, { displayModeBar: false, responsive: true, doubleClick: "reset" });
    if (!plot.dataset.bound) {
      plot.on("plotly_click", (event) => showDetails(event.points[0].customdata));
      plot.dataset.bound = "true";
    }
  }

  function buildFigure(kind, title, axes) {
    const choice =
      axes &&
      h(
        "select",
        {
          onchange: (event) => {
            state[kind] = event.target.value;
            drawChart(kind);
          },
        },
        axes.map((axis) => h("option", { value: axis.key, selected: axis.key === state[kind] }, axis.axis)),
      );
    byId(kind).replaceChildren(
      h(
        "figcaption",
        {},
        h("label", {}, h("span", {}, title), choice),
        h("button", { type: "button", onclick: () => savePng(kind), "aria-label": `${title}: save as PNG` }, "PNG"),
      ),
      h("div", { class: "plot" }),
      h("p", { class: "missing caption" }),
    );
  }

  // ------------------------------------------------------------------------------------------------ tables

  const lines = (first, second) => [h("span", {}, first), second ? h("small", {}, second) : null];

  /** Columns: key, head, value(row) to sort by, cell(row) -> nodes; text columns are set left. */
  function table(id, columns, rows) {
    const sort = state.sort[id];
    const column = columns.find((candidate) => candidate.key === sort?.key);
    const ordered = [...rows];
    if (column) {
      ordered.sort((a, b) => {
        const [x, y] = [column.value(a), column.value(b)];
        if (x == null || y == null) return (x == null) - (y == null); // what is missing comes last either way
        return sort.direction * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
    }
    const focused = document.activeElement?.closest?.(`#${id} th`)?.dataset.key;
    const head = columns.map((candidate) => {
      const active = candidate.key === column?.key;
      const button = h(
        "button",
        {
          type: "button",
          onclick: () => {
            state.sort[id] = { key: candidate.key, direction: active ? -sort.direction : 1 };
            render();
          },
        },
        lines(candidate.head[0], candidate.head[1]),
        h("i", { "aria-hidden": "true" }, active ? (sort.direction > 0 ? "▲" : "▼") : ""),
      );
      return h(
        "th",
        {
          scope: "col",
          class: candidate.text && "text",
          "data-key": candidate.key,
          title: candidate.title,
          "aria-sort": active ? (sort.direction > 0 ? "ascending" : "descending") : "none",
        },
        button,
      );
    });
    const body = ordered.map((row) =>
      h(
        "tr",
        { class: row.id && row.id === state.selected ? "selected" : null },
        columns.map((candidate, i) =>
          h(i ? "td" : "th", { class: candidate.text && "text", scope: i ? null : "row" }, candidate.cell(row)),
        ),
      ),
    );
    byId(id).replaceChildren(h("thead", {}, h("tr", {}, head)), h("tbody", {}, body));
    if (focused)
      byId(id)
        .querySelector(`th[data-key="${CSS.escape(focused)}"] button`)
        ?.focus();
    return ordered;
  }

  const opener = (point) =>
    h(
      "button",
      { type: "button", class: "opener", "data-point": point.id, onclick: () => showDetails(point.id) },
      swatch(point.policy),
      h("span", {}, point.unreduced ? "none" : point.policy),
      setting(point) ? h("small", {}, setting(point)) : null,
    );

  function pointColumns() {
    const has = (key) => visible.some((point) => point[key] != null);
    const number = (key, head, write, second) => ({
      key,
      head,
      value: (p) => p[key],
      cell: (p) => lines(shown(p[key], write), second?.(p)),
    });
    return [
      {
        key: "policy",
        head: ["Policy"],
        text: true,
        value: (p) => `${p.policy} ${setting(p)}`,
        cell: (p) => [opener(p)],
      },
      number("reduction", ["FLOPs cut, %", "asked"], percent, (p) =>
        p.unreduced ? "" : p.ratio == null ? "counts" : percent(p.ratio),
      ),
      number(
        "flops_true",
        ["GFLOPs", "literature"],
        (v) => figure(1e-9 * v),
        (p) => shown(p.flops_literature, (v) => figure(1e-9 * v)),
      ),
      {
        key: "tokens",
        head: ["Tokens", "last block"],
        value: (p) => p.tokens.at(-1),
        cell: (p) =>
          lines(String(p.tokens[0] ?? ABSENT), p.tokens.at(-1) !== p.tokens[0] ? `→ ${p.tokens.at(-1)}` : ""),
      },
      ...METRICS.filter((metric) => has(metric.key)).map((metric) =>
        number(
          metric.key,
          [metric.scale === 100 ? `${metric.name}, %` : `${metric.name}, nats`, ""],
          metric.write,
          (p) => interval(p, metric),
        ),
      ),
      ...(has("img_per_s")
        ? [
            number("img_per_s", ["img/s", "× unreduced"], figure, (p) =>
              p.speedup == null ? "" : `× ${p.speedup.toFixed(2)}`,
            ),
          ]
        : []),
      ...(has("p50") ? [number("p50", ["ms, p50", "p95"], figure, (p) => shown(p.p95, figure))] : []),
      ...(has("peak_mib") ? [number("peak_mib", ["Peak MiB"], figure)] : []),
      ...(new Set(points.map((p) => p.images)).size > 1 || points.some((p) => p.skipped.length)
        ? [number("images", ["Images"], String, (p) => (p.skipped.length ? `${p.skipped.length} skipped` : ""))]
        : []),
    ];
  }

  const comparisons = ["top1", "agreement", "kl", "miou", "map", "ap50"];
  const MINUS = "−";
  const signed = (metric, value) => {
    const text = metric.write(Math.abs(value));
    return Number(text) === 0 ? text : (value < 0 ? MINUS : "+") + text;
  };

  /** Differences to the chosen baseline, of the visible points that can be paired with it. */
  function differenceRows() {
    const byPlace = new Map(points.flatMap((point) => point.places.map((place) => [place.join("/"), point])));
    const pairs = [];
    for (const found of data.differences) {
      const [first, second] = [byPlace.get(found.first.join("/")), byPlace.get(found.second.join("/"))];
      pairs.push({ base: first, point: second, found, sign: 1 });
      if (!first.unreduced) pairs.push({ base: second, point: first, found, sign: -1 });
    }
    const inView = pairs.filter(
      ({ base, point }) =>
        isVisible(point) && base.series !== point.series && FACETS.every(({ key, of }) => of || isVisibleIn(key, base)),
    );
    const bases = groupBy(inView, ({ base }) => (base.unreduced ? "unreduced" : base.series));
    return {
      bases,
      rowsOf: (base) =>
        (bases.get(base) ?? [])
          .map(({ base: to, point, found, sign }) => ({
            id: point.id,
            point,
            base: to,
            ...Object.fromEntries(
              comparisons
                .filter((key) => found[key])
                .map((key) => {
                  const {
                    difference,
                    ci: [lo, hi],
                    significant,
                  } = found[key];
                  return [
                    key,
                    { value: sign * difference || 0, ci: sign > 0 ? [lo, hi] : [-hi || 0, -lo || 0], significant },
                  ];
                }),
            ),
          }))
          .sort((a, b) => byCost(a.point, b.point) || a.point.policy.localeCompare(b.point.policy)),
    };
  }

  const isVisibleIn = (key, point) => !state.chosen[key].size || state.chosen[key].has(point[key]);

  /** An interval on a scale all rows share, with zero marked. */
  function strip({ value, ci, significant }, metric, limit) {
    const x = (number) => 60 + (56 * number) / limit;
    const kind = !significant ? "unclear" : metric.better * value > 0 ? "better" : "worse";
    return svg(
      "svg",
      { viewBox: "0 0 120 14", class: `strip ${kind}`, "aria-hidden": "true" },
      svg("line", { x1: 60, x2: 60, y1: 0, y2: 14, class: "zero" }),
      svg("line", { x1: x(ci[0]), x2: x(ci[1]), y1: 7, y2: 7, class: "range" }),
      svg("circle", { cx: x(value), cy: 7, r: 3 }),
    );
  }

  function verdict({ value, significant }, metric) {
    return !significant ? "no difference shown" : metric.better * value > 0 ? "better" : "worse";
  }

  function differenceColumns(rows) {
    const metrics = comparisons
      .map((key) => METRICS.find((metric) => metric.key === key))
      .filter((metric) => rows.some((row) => row[metric.key]));
    return [
      {
        key: "policy",
        head: ["Policy"],
        text: true,
        value: ({ point }) => `${point.policy} ${setting(point)}`,
        cell: ({ point }) => [opener(point)],
      },
      {
        key: "ratio",
        head: ["Asked, %"],
        value: ({ point }) => point.ratio ?? point.reduction,
        cell: ({ point }) => [point.ratio == null ? "counts" : percent(point.ratio)],
      },
      ...metrics.map((metric) => {
        const limit = Math.max(...rows.flatMap((row) => row[metric.key]?.ci ?? []).map(Math.abs), 1e-12);
        return {
          key: metric.key,
          head: [`Δ ${metric.name}`, metric.scale === 100 ? "percentage points" : "nats"],
          value: (row) => row[metric.key]?.value,
          cell: (row) => {
            const found = row[metric.key];
            if (!found) return [ABSENT];
            const said = verdict(found, metric);
            const mark = { better: "▲", worse: "▼" }[said] ?? "○";
            return [
              h(
                "div",
                { class: `difference ${said.split(" ")[0]}`, title: said },
                h("span", { class: "mark", role: "img", "aria-label": said }, mark),
                h(
                  "span",
                  {},
                  lines(signed(metric, found.value), `${signed(metric, found.ci[0])} … ${signed(metric, found.ci[1])}`),
                ),
                strip(found, metric, limit),
              ),
            ];
          },
        };
      }),
    ];
  }

  function drawDifferences() {
    const { bases, rowsOf } = differenceRows();
    const options = [...bases.keys()].sort((a, b) => (a === "unreduced") - (b === "unreduced"));
    const most = options.reduce(
      (best, key) => (key !== "unreduced" && bases.get(key).length > (bases.get(best)?.length ?? 0) ? key : best),
      null,
    );
    const chosen = options.includes(state.baseline) ? state.baseline : (most ?? options[0] ?? null);
    byId("baseline").replaceChildren(
      ...options.map((key) => {
        const [{ base }] = bases.get(key);
        return h(
          "option",
          { value: key, selected: key === chosen },
          key === "unreduced" ? "the unreduced model" : `${label(base)}, at the same ratio`,
        );
      }),
    );
    byId("baseline-line").hidden = !options.length;
    const rows = chosen ? rowsOf(chosen) : [];
    byId("differences").hidden = !rows.length;
    byId("differences-actions").hidden = !rows.length;
    const paired = data.runs.filter((run) => run.paired).length;
    const name = chosen === "unreduced" ? "the unreduced model" : chosen && label(bases.get(chosen)[0].base);
    byId("differences-caption").textContent = rows.length
      ? `Point minus ${name}${chosen === "unreduced" ? "" : " at the same asked ratio"}, image by image, with the 95 % interval of a paired bootstrap over images ` +
        `(${data.resamples.toLocaleString("en")} resamples). ▲ better, ▼ worse: the interval excludes 0, which is the test; ○ no difference shown. ` +
        "Each comparison is tested on its own: of twenty without any difference, about one is expected to be marked."
      : `Nothing to compare in pairs: it takes points of classifiers over the same images, with predictions.npz beside their result.json (${paired} of ${data.runs.length} runs have that). A detector's or segmenter's differences to the unreduced model are in its run's own table.`;
    return table("differences", differenceColumns(rows), rows);
  }

  function drawRuns() {
    const shownRuns = data.runs.filter((run) => points.some((point) => point.runs.includes(run) && isVisible(point)));
    const get = (key, head, value, text = true) => ({
      key,
      head: [head],
      text,
      value,
      cell: (run) => [shown(value(run), String)],
    });
    return table(
      "runs",
      [
        get("name", "Run", (run) => run.name),
        get("backbone", "Backbone", (run) => run.result.backbone),
        get("dataset", "Dataset", (run) => run.result.dataset),
        get("weights", "Weights", (run) => run.result.weights?.sha256?.slice?.(0, 12) ?? run.result.weights?.source),
        get("hardware", "Hardware", (run) => run.hardware),
        get("torch", "PyTorch", (run) => run.result.environment.torch),
        get(
          "commit",
          "Commit",
          (run) =>
            run.result.environment.commit &&
            run.result.environment.commit.slice(0, 10) +
              (run.result.environment.commit.endsWith("-dirty") ? "-dirty" : ""),
        ),
        get("paired", "Predictions", (run) => (run.paired ? "yes" : "no")),
      ],
      shownRuns,
    );
  }

  // ------------------------------------------------------------------------------------------------ export

  function download(name, content) {
    const url =
      typeof content === "string" && content.startsWith("data:")
        ? content
        : URL.createObjectURL(new Blob([content], { type: "text/plain;charset=utf-8" }));
    h("a", { href: url, download: name }).click();
    if (url.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  function csv(rows) {
    const cell = (value) => {
      // Text that a spreadsheet would take for a formula is quoted.
      const text =
        value == null ? "" : typeof value === "string" ? value.replace(/^(?=[=+\-@\t\r])/, "'") : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const columns = [...new Set(rows.flatMap(Object.keys))];
    return (
      [columns, ...rows.map((row) => columns.map((column) => row[column]))]
        .map((row) => row.map(cell).join(","))
        .join("\n") + "\n"
    );
  }

  /** Every number as it is in the result, unrounded; shares are fractions. */
  function flat(point) {
    const row = { run: point.run.name, runs: point.runs.length };
    for (const key of ["task", "backbone", "dataset", "hardware", "policy", "variant"]) row[key] = point[key];
    for (const [key, value] of Object.entries(point.result)) {
      if (key.endsWith("_ci")) [row[key.replace("_ci", "_lo")], row[key.replace("_ci", "_hi")]] = value;
      else if (key === "latency_ms") [row.latency_p50_ms, row.latency_p95_ms] = [value.p50, value.p95];
      else if (key === "tokens" || key === "seeds") row[key] = value.join(" ");
      else if (key === "skipped") row.skipped = value.length;
      else if (typeof value !== "object" || value === null) row[key] = value;
    }
    return row;
  }

  function flatDifference(row) {
    const record = {
      policy: row.point.policy,
      variant: row.point.variant,
      ratio: row.point.ratio,
      baseline: row.base.policy,
      baseline_variant: row.base.variant,
    };
    for (const key of ["task", "backbone", "dataset", "hardware"]) record[key] = row.point[key];
    for (const key of comparisons.filter((name) => row[name])) {
      const { value, ci, significant } = row[key];
      Object.assign(record, {
        [`${key}_difference`]: value,
        [`${key}_lo`]: ci[0],
        [`${key}_hi`]: ci[1],
        [`${key}_significant`]: significant,
      });
    }
    return record;
  }

  const LATEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "×": "$\\times$",
    "±": "$\\pm$",
    "·": "$\\cdot$",
    Δ: "$\\Delta$",
    "√": "$\\surd$",
  };
  const latexText = (text) => String(text).replace(/[\\{}$&#^_~%–−×±·Δ√]/g, (c) => LATEX[c] ?? `\\${c}`);

  function latex(columns, rows) {
    const row = (cells) => `${cells.join(" & ")} \\\\`;
    return [
      `% needs \\usepackage{booktabs}; brackets: 95 % intervals${averaged() ? ", ±: standard deviation over seeds" : ""}`,
      `\\begin{tabular}{${columns.map((column) => (column.text ? "l" : "r")).join("")}}`,
      "\\toprule",
      row(columns.map((column) => column.head)),
      "\\midrule",
      ...rows.map((item) => row(columns.map((column) => latexText(column.write(item))))),
      "\\bottomrule",
      "\\end{tabular}",
      "",
    ].join("\n");
  }

  function pointsLatex(rows) {
    const column = (head, key, write) => ({ head, write: (p) => shown(p[key], write), key });
    const name = { head: "Policy", text: true, write: (p) => label(p, rows) };
    const giga = (value) => figure(1e-9 * value);
    return latex(
      [
        name,
        ...[
          column("FLOPs removed (\\%)", "reduction", percent),
          column("GFLOPs", "flops_true", giga),
          column("GFLOPs (lit.)", "flops_literature", giga),
          ...METRICS.map((metric) => ({
            ...column(metric.latex, metric.key),
            write: (p) =>
              [shown(p[metric.key], metric.write), interval(p, metric) && `(${interval(p, metric)})`]
                .filter(Boolean)
                .join(" "),
          })),
          column("img/s", "img_per_s", figure),
        ].filter(({ key }) => rows.some((p) => p[key] != null)),
      ],
      rows,
    );
  }

  function differencesLatex(rows) {
    return latex(
      [
        {
          head: "Policy",
          text: true,
          write: (row) =>
            label(
              row.point,
              rows.map(({ point }) => point),
            ),
        },
        { head: "Asked (\\%)", write: ({ point }) => shown(point.ratio, percent) },
        ...METRICS.filter((metric) => rows.some((row) => row[metric.key])).map((metric) => ({
          head: `$\\Delta$ ${metric.latex}`,
          write: (row) =>
            row[metric.key]
              ? `${signed(metric, row[metric.key].value)}${row[metric.key].significant ? "*" : ""} (${row[metric.key].ci.map((end) => signed(metric, end)).join(" – ")})`
              : ABSENT,
        })),
      ],
      rows,
    ).replace("95 % intervals", "95 % intervals of a paired bootstrap, * excludes 0");
  }

  async function savePng(kind) {
    const {
      figure: { data: traces, layout: spec },
    } = chartSpec(kind, THEMES.light, true);
    const size = { width: 900, height: heightWithLegend(traces, 900, 540) };
    download(`${kind}.png`, await Plotly.toImage({ data: traces, layout: spec }, { format: "png", scale: 2, ...size }));
  }

  function buildActions(id, rows, toCsv, toLatex) {
    byId(`${id}-actions`).replaceChildren(
      h("button", { type: "button", onclick: () => download(`${id}.csv`, csv(rows().map(toCsv))) }, "CSV"),
      h("button", { type: "button", onclick: () => download(`${id}.tex`, toLatex(rows())) }, "LaTeX"),
    );
  }

  // ------------------------------------------------------------------------------------------------ details

  /** Dotted keys and values of nested settings, as they are typed on the command line. */
  function flatten(node, prefix = "") {
    if (node === null || typeof node !== "object" || Array.isArray(node) || !Object.keys(node).length) {
      return [[prefix, typeof node === "string" ? node : JSON.stringify(node)]];
    }
    return Object.entries(node).flatMap(([key, value]) => flatten(value, prefix ? `${prefix}.${key}` : key));
  }

  function pairsTable(rows) {
    return h(
      "table",
      { class: "pairs" },
      h(
        "tbody",
        {},
        rows.map(([key, value]) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, value))),
      ),
    );
  }

  function tokensStrip(tokens, own) {
    const [width, height, most] = [360, 72, Math.max(...tokens)];
    const step = width / tokens.length;
    return svg(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        class: "tokens",
        role: "img",
        "aria-label": `Tokens per block: ${tokens.join(", ")}`,
      },
      ...tokens.map((count, block) =>
        svg("rect", {
          x: block * step + 0.5,
          width: step - 1,
          y: height * (1 - count / most),
          height: (height * count) / most,
          fill: own,
        }),
      ),
    );
  }

  let returnTo = null;

  function showDetails(id) {
    const point = points.find((candidate) => candidate.id === id);
    if (!point) return;
    if (byId("details").hidden) returnTo = document.activeElement;
    state.selected = id;
    const { run } = point;
    const settings = flatten(run.result.config);
    const list = h("div", {});
    const search = (text) => {
      const wanted = text.trim().toLowerCase();
      const kept = settings.filter(([key, value]) => `${key}=${value}`.toLowerCase().includes(wanted));
      list.replaceChildren(kept.length ? pairsTable(kept) : h("p", { class: "caption" }, "No setting matches."));
    };
    search("");
    const numbers = [
      ["asked", point.unreduced ? null : ratioName(point)],
      ["FLOPs removed", shown(point.reduction, (v) => `${percent(v)} %`)],
      ["FLOPs, true", shown(point.flops_true, (v) => `${figure(1e-9 * v)} G`)],
      [
        "of these, the reduction's own",
        point.unreduced ? null : shown(point.flops_overhead, (v) => `${figure(1e-6 * v)} M`),
      ],
      ["FLOPs, literature", shown(point.flops_literature, (v) => `${figure(1e-9 * v)} G`)],
      ...METRICS.filter((metric) => point[metric.key] != null).map((metric) => [
        metric.name,
        `${metric.write(point[metric.key])}${metric.scale === 100 ? " %" : " nats"}${interval(point, metric) && ` (${interval(point, metric)})`}`,
      ]),
      ["images", `${point.images}${point.skipped.length ? `, ${point.skipped.length} skipped` : ""}`],
      [
        "images per second",
        point.img_per_s == null
          ? "not measured"
          : figure(point.img_per_s) +
            (point.speedup == null || point.unreduced ? "" : `, × ${point.speedup.toFixed(2)} unreduced`),
      ],
      [
        "latency of one image",
        point.p50 == null ? null : `${figure(point.p50)} ms, 95th percentile ${shown(point.p95, figure)} ms`,
      ],
      ["peak memory", point.peak_mib == null ? null : `${figure(point.peak_mib)} MiB`],
    ].filter(([, value]) => value != null);
    const speeds = point.runs
      .map((other) => other.result.points.find((p) => p.policy === "none")?.img_per_s)
      .filter((speed) => speed != null);
    const repeated = point.seeds
      ? `Mean of the seeds ${point.seeds.join(", ")}, ± the standard deviation over them: runs ` +
        `${point.runs.map((other) => other.name).join(", ")}. Configuration and pictures are the first one's.`
      : point.runs.length > 1
        ? `Found alike in ${point.runs.length} runs${speeds.length ? `, at ${figure(Math.min(...speeds))} to ${figure(Math.max(...speeds))} img/s` : ""}; shown is the median one.`
        : null;
    const section = (title, ...children) => h("section", {}, h("h3", {}, title), ...children);
    byId("details").replaceChildren(
      h(
        "div",
        { class: "bar" },
        h(
          "h2",
          { id: "details-title", tabindex: "-1" },
          swatch(point.policy),
          label(point, [point]),
          point.unreduced ? "" : ` at ${ratioName(point)}`,
        ),
        h("button", { type: "button", class: "close", "aria-label": "Close", onclick: hideDetails }, "✕"),
      ),
      h(
        "p",
        { class: "caption" },
        `${run.name} · ${point.backbone} · ${point.task} · ${point.dataset} · ${point.hardware}`,
      ),
      repeated ? h("p", { class: "caption" }, repeated) : "",
      pairsTable(numbers),
      point.tokens.length
        ? section(
            "Tokens per block",
            tokensStrip(point.tokens, colour(point.policy, theme())),
            h("p", { class: "caption" }, point.tokens.join(", ")),
          )
        : "",
      run.pictures.length
        ? section(
            "Pictures",
            ...run.pictures.map(({ name, uri }) =>
              h("figure", {}, h("img", { src: uri, alt: name }), h("figcaption", {}, name)),
            ),
          )
        : "",
      section(
        "Configuration",
        h("input", {
          type: "search",
          placeholder: `search ${settings.length} settings`,
          "aria-label": "Search the configuration",
          oninput: (event) => search(event.target.value),
        }),
        list,
      ),
      section("Environment", pairsTable(flatten(run.result.environment))),
      run.result.weights ? section("Weights", pairsTable(flatten(run.result.weights))) : "",
      point.skipped.length
        ? section(
            "Skipped files",
            h(
              "ul",
              {},
              point.skipped.map((file) => h("li", {}, file)),
            ),
          )
        : "",
    );
    byId("details").hidden = false;
    byId("details").scrollTop = 0;
    byId("details-title").focus({ preventScroll: true });
    render();
  }

  function hideDetails() {
    const opened = state.selected;
    state.selected = null;
    byId("details").hidden = true;
    render();
    // The table was drawn anew, and with it the button that opened the panel.
    const again = returnTo?.isConnected
      ? returnTo
      : [...document.querySelectorAll(".opener")].find((node) => node.dataset.point === opened);
    again?.focus({ preventScroll: true });
  }

  // ------------------------------------------------------------------------------------------------ the page

  function buildFilters() {
    const focused = document.activeElement?.dataset?.chip;
    byId("facets").replaceChildren(
      ...FACETS.filter((facet) => facet.values.length).map((facet) => {
        const chips = facet.values.map((value) =>
          facet.values.length === 1
            ? h("span", { class: "chip only" }, facet.key === "policy" ? swatch(value) : null, value)
            : h(
                "button",
                {
                  type: "button",
                  class: "chip",
                  "data-chip": `${facet.key}=${value}`,
                  "aria-pressed": String(state.chosen[facet.key].has(value)),
                  onclick: (event) => {
                    const chosen = state.chosen[facet.key];
                    if (!chosen.delete(value)) chosen.add(value);
                    event.currentTarget.setAttribute("aria-pressed", String(chosen.has(value)));
                    render();
                  },
                },
                facet.key === "policy" ? swatch(value) : null,
                value,
              ),
        );
        return h("fieldset", { "data-facet": facet.key }, h("legend", {}, facet.name), chips);
      }),
    );
    if (focused) document.querySelector(`[data-chip="${CSS.escape(focused)}"]`)?.focus();
  }

  function buildMetrics() {
    const present = METRICS.filter((metric) => visible.some((point) => point[metric.key] != null));
    if (!present.some((metric) => metric.key === state.metric)) state.metric = (present[0] ?? METRICS[0]).key;
    const drawn = [...byId("metrics").querySelectorAll("input")].map((input) => input.value);
    if (drawn.join() === present.map((metric) => metric.key).join()) return;
    byId("metrics").replaceChildren(
      h("legend", {}, "Quality"),
      ...present.map((metric) =>
        h(
          "label",
          {},
          h("input", {
            type: "radio",
            name: "metric",
            value: metric.key,
            checked: metric.key === state.metric,
            onchange: () => {
              state.metric = metric.key;
              render();
            },
          }),
          h("span", {}, metric.name),
        ),
      ),
    );
  }

  let pointRows = [],
    differenceRowsShown = [];

  function render() {
    visible = points.filter(isVisible);
    buildMetrics();
    byId("shown").textContent =
      `${visible.length} of ${points.length} points shown. Nothing chosen in a group shows all of it.`;
    byId("clear").hidden = !FACETS.some((facet) => state.chosen[facet.key].size);
    for (const kind of ["cost", "speed", "tokens"]) drawChart(kind);
    drawLegend();
    const metric = metricNow();
    byId("tradeoff-caption").textContent =
      "Bars: 95 % intervals (Wilson for shares, bootstrap over images for KL), where the result has them" +
      `${averaged() ? "; of a mean over seeds, ± a standard deviation" : ""}. ` +
      "Grey band: Pareto front of the points shown, " +
      `one a ${metric.own ? "backbone" : "task and dataset"} and number of images, and for speed one a hardware. Dashed: unreduced. ${metric.better < 0 ? "Lower is better. " : ""}` +
      "Speeds were measured run by run and have no interval: only those of one run were taken under the same conditions. " +
      "Click a point for all about it.";
    const sorted = [...visible].sort(
      (a, b) => byCost(a, b) || a.policy.localeCompare(b.policy) || a.variant.localeCompare(b.variant),
    );
    pointRows = table("points", pointColumns(), sorted);
    const repeated = visible.some((point) => point.runs.length > 1 && !point.seeds);
    byId("points-caption").textContent =
      "Small: the 95 % interval, or what the heading says in small. GFLOPs are true FLOPs of an image, two per " +
      "multiply-accumulate, the reduction's own cost charged; the literature counts multiply-accumulates and one direction." +
      (repeated
        ? " An unreduced model that several runs found alike is one row, with the speed of the median run."
        : "") +
      (averaged() ? " Runs that differ in mtr.seed alone are one row: the mean, ± the standard deviation over the seeds." : "");
    differenceRowsShown = drawDifferences();
    drawRuns();
  }

  function drawPage() {
    const distinct = (key) => [...new Set(points.map((point) => point[key]))].sort();
    const images = [...new Set(points.map((point) => point.images))].sort((a, b) => a - b);
    byId("title").textContent = distinct("backbone").join(", ") || "Waiting for results";
    document.title = `${byId("title").textContent} · mtr_lab report`;
    const count = (number, name) => `${number.toLocaleString("en")} ${name}${number === 1 ? "" : "s"}`;
    byId("summary").textContent = [
      distinct("task").join(", "),
      distinct("dataset").join(", "),
      images.length && (images.length > 1 ? `${images[0]} to ${images.at(-1)} images` : count(images[0], "image")),
      count(data.runs.length, "run"),
      count(points.length, "point"),
      distinct("hardware").join("; "),
      `drawn from files of ${data.written.replace("T", " ").slice(0, 16)}`,
    ]
      .filter(Boolean)
      .join(" · ");
    byId("notes").hidden = !data.notes.length;
    byId("notes").querySelector("summary").textContent = count(data.notes.length, "note");
    byId("notes")
      .querySelector("ul")
      .replaceChildren(...data.notes.map((note) => h("li", {}, note)));
    buildFilters();
    render();
  }

  async function follow() {
    let tag = null;
    for (;;) {
      try {
        const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
        if (answer.status === 200) {
          load(await answer.json());
          tag = answer.headers.get("ETag");
          drawPage();
        }
        byId("live").textContent =
          answer.ok || answer.status === 304
            ? `Following, ${data.runs.length} runs so far`
            : `Stopped: ${await answer.text()}`;
        byId("live").dataset.state = answer.ok || answer.status === 304 ? "on" : "off";
      } catch {
        byId("live").textContent = "The server does not answer; this is what it last said";
        byId("live").dataset.state = "off";
      }
      await new Promise((resolve) => setTimeout(resolve, 1500));
    }
  }

  load(JSON.parse(byId("data").textContent));
  buildFigure("cost", "against", COSTS);
  buildFigure("speed", "against", SPEEDS);
  buildFigure("tokens", "", null);
  buildActions("points", () => pointRows, flat, pointsLatex);
  buildActions("differences", () => differenceRowsShown, flatDifference, differencesLatex);
  byId("baseline").addEventListener("change", (event) => {
    state.baseline = event.target.value;
    render();
  });
  byId("clear").addEventListener("click", () => {
    for (const facet of FACETS) state.chosen[facet.key].clear();
    buildFilters();
    render();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("details").hidden) hideDetails();
  });
  dark.addEventListener("change", drawPage);
  print.addEventListener("change", drawPage);
  drawPage();
  byId("live").hidden = !live;
  if (live) follow();
})();
