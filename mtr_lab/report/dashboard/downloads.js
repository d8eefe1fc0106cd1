// CSV, LaTeX and PNG.

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
    // A spreadsheet would run text that starts like a formula: quote it.
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

/** A point as a CSV row: every number unrounded, as in the result; shares are fractions. */
function flat(point) {
  const row = { run: point.run.name, runs: point.runs.length };
  for (const key of ["task", "backbone", "dataset", "hardware", "policy", "variant"]) row[key] = point[key];
  for (const [key, value] of Object.entries(point.result)) {
    if (key.endsWith("_ci")) [row[key.replace("_ci", "_lo")], row[key.replace("_ci", "_hi")]] = value;
    else if (key === "latency_ms") [row.latency_p50_ms, row.latency_p95_ms] = [value.p50, value.p95];
    else if (key === "tokens" || key === "seeds") row[key] = value.join(" ");
    else if (key === "resolution") row[key] = value.join("x");
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
  for (const { key } of COMPARED.filter((metric) => row[metric.key])) {
    const { value, ci, p, p_holm, significant } = row[key];
    Object.assign(record, {
      [`${key}_difference`]: value,
      [`${key}_lo`]: ci[0],
      [`${key}_hi`]: ci[1],
      [`${key}_p`]: p,
      [`${key}_p_holm`]: p_holm,
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
  "…": "\\dots{}",
  "·": "$\\cdot$",
  Δ: "$\\Delta$",
  "√": "$\\surd$",
};
const latexText = (text) => String(text).replace(/[\\{}$&#^_~%–−×±…·Δ√]/g, (c) => LATEX[c] ?? `\\${c}`);

const LATEX_NOTE = [
  "% \\usepackage{booktabs,siunitx}",
  "% \\sisetup{text-series-to-math=true,propagate-math-font=true}",
];

function latexRow(cells) {
  return `${cells.join(" & ")} \\\\`;
}

/** A column of numbers: S aligns them at the point. */
function aligned(texts) {
  const parts = texts.map((text) => text.match(/(\d+)(?:\.(\d+))?/)).filter(Boolean);
  const digits = (index) => Math.max(0, ...parts.map((part) => part[index]?.length ?? 0));
  return `S[table-format=${texts.some((text) => /^[-+−]/.test(text)) ? "-" : ""}${digits(1) || 1}.${digits(2)}]`;
}

/** The columns to choose from for the table of points. */
function latexColumns(rows) {
  const column = (key, head, write, axis) => ({ key, head, write: (p) => write(p[key]), axis });
  const giga = (value) => figure(1e-9 * value);
  return [
    column("reduction", "Removed (\\%)", percent),
    column("flops_true", "GFLOPs", giga),
    column("flops_literature", "GFLOPs (lit.)", giga),
    ...METRICS.map((metric) => column(metric.key, metric.latex, metric.write, metric)),
    column("speedup", "Speed ($\\times$)", (value) => value.toFixed(2), SPEEDS.find(({ key }) => key === "speedup")),
    column("img_per_s", "img/s", figure),
    column("latency_p50", "ms", figure),
    column("peak_mib", "MiB", figure),
  ].filter(({ key }) => rows.some((p) => p[key] != null));
}

const LATEX_WIDE = ["reduction", "flops_literature", "top5", "img_per_s", "latency_p50", "peak_mib", "intervals"];

/** Whether the paired difference of two points is not significant; false where they were not compared. */
function alike(a, b, key) {
  const places = (point) => new Set(point.places.map((place) => place.join("/")));
  const [one, other] = [places(a), places(b)];
  const pair = data.differences.find(({ first, second }) => {
    const [x, y] = [first.join("/"), second.join("/")];
    return (one.has(x) && other.has(y)) || (one.has(y) && other.has(x));
  });
  return pair?.[key] ? pair[key].p_holm >= 0.05 : false;
}

/** For each column of quality: the best of a group, the rows that do not differ from it, and the second best. */
function marksOf(members, columns) {
  const marks = new Map();
  for (const { key, axis } of columns.filter((column) => column.axis)) {
    const ranked = members.filter((p) => p[key] != null).sort((a, b) => axis.better * (b[key] - a[key]));
    if (ranked.length < 2) continue;
    const best = ranked.filter((p) => p[key] === ranked[0][key] || alike(ranked[0], p, key));
    for (const point of best) marks.set(`${point.id} ${key}`, "best");
    const second = ranked.find((p) => !best.includes(p));
    if (second) marks.set(`${second.id} ${key}`, "second");
  }
  return marks;
}

function pointsLatex(rows) {
  const columns = latexColumns(rows).filter(({ key }) => state.latex.has(key));
  const intervals = state.latex.has("intervals");
  const spec = columns.map((c) => aligned(rows.filter((p) => p[c.key] != null).map(c.write))).join("");
  const groups = groupBy(rows, (p) => (p.unreduced ? "" : p.ratio != null || p.budget ? ratioName(p) : "other"));
  const body = [...groups].flatMap(([asked, members]) => {
    const marks = asked ? marksOf(members, columns) : new Map();
    const cells = members.flatMap((p) => [
      latexRow([
        latexText(label(p, rows)),
        ...columns.map(({ key, write }) => {
          if (p[key] == null) return "{--}";
          const text = write(p).replace("−", "-");
          const mark = marks.get(`${p.id} ${key}`);
          return mark === "best" ? `\\bfseries ${text}` : mark === "second" ? `{\\underline{${text}}}` : text;
        }),
      ]),
      ...(intervals
        ? [latexRow(["", ...columns.map(({ key, write }) => `{\\tiny ${latexText(interval(p, { key }, (v) => write({ [key]: v })))}}`)])]
        : []),
    ]);
    const heading = asked === "" ? [] : [`\\multicolumn{${columns.length + 1}}{@{}l}{\\emph{${latexText(askedTitle(asked))}}} \\\\`];
    return ["\\midrule", ...heading, ...cells];
  });
  return [
    ...LATEX_NOTE,
    "% Bold: best of its group, and points without a significant paired difference to it (p >= 0.05, Holm's correction). Underlined: second.",
    "\\footnotesize\\setlength{\\tabcolsep}{3pt}",
    `\\begin{tabular}{@{}l${spec}@{}}`,
    "\\toprule",
    latexRow(["Policy", ...columns.map(({ head }) => `{${nameOf(head)}}`)]),
    latexRow(["", ...columns.map(({ head }) => `{${unitOf(head)}}`)]),
    ...body,
    "\\bottomrule",
    "\\end{tabular}",
    "",
  ].join("\n");
}

/** A heading is two rows, so that the table is one column wide: the name, and the unit in brackets. */
const nameOf = (head) => head.replace(/ \(.*\)$/, "");
const unitOf = (head) => head.match(/\((.*)\)$/)?.[1] ?? "";

const askedTitle = (asked) => (asked.endsWith(" %") ? `${asked} of the FLOPs removed` : asked);

function differencesLatex(rows) {
  const metrics = METRICS.filter((metric) => rows.some((row) => row[metric.key]));
  const among = rows.map(({ point }) => point);
  const cell = (row, metric) => {
    if (!row[metric.key]) return "{--}";
    const { value, significant } = row[metric.key];
    return latexText(signed(metric, value)) + (significant ? "*" : "\\phantom{*}");
  };
  const ends = (row, metric) =>
    row[metric.key] ? `{\\tiny ${latexText(row[metric.key].ci.map((end) => signed(metric, end)).join(" … "))}}` : "";
  return [
    LATEX_NOTE[0].replace(",siunitx", ""),
    "% Small: 95 % intervals of a paired bootstrap. *: p < 0.05 after Holm's correction.",
    "\\footnotesize\\setlength{\\tabcolsep}{3pt}",
    `\\begin{tabular}{@{}lr${"r".repeat(metrics.length)}@{}}`,
    "\\toprule",
    latexRow(["Policy", "Asked", ...metrics.map((metric) => `$\\Delta$ ${nameOf(metric.latex)}`)]),
    latexRow(["", "\\%", ...metrics.map((metric) => unitOf(metric.latex))]),
    "\\midrule",
    ...rows.flatMap((row) => [
      latexRow([latexText(label(row.point, among)), shown(row.point.ratio, percent), ...metrics.map((m) => cell(row, m))]),
      latexRow(["", "", ...metrics.map((m) => ends(row, m))]),
    ]),
    "\\bottomrule",
    "\\end{tabular}",
    "",
  ].join("\n");
}

/** The columns of the LaTeX table, to be chosen; at first those that fit one column of a paper. */
function latexChoice() {
  const columns = [...latexColumns(visible).map(({ key, head }) => [key, plainHead(head)]), ["intervals", "intervals"]];
  state.latex ??= new Set(columns.map(([key]) => key).filter((key) => !LATEX_WIDE.includes(key)));
  return h(
    "details",
    { class: "columns" },
    h("summary", {}, "Columns"),
    h("div", {}, columns.map(([key, name]) =>
      h("label", {}, h("input", { type: "checkbox", checked: state.latex.has(key), onchange: (event) => state.latex[event.target.checked ? "add" : "delete"](key) }), ` ${name}`),
    )),
  );
}

const plainHead = (head) => head.replaceAll("\\%", "%").replace("$\\times$", "×").replaceAll(/[\\${}]/g, "");

/** Save a chart as SVG or PNG, with its legend, on white. */
async function saveChart(kind, format) {
  const {
    figure: { data: traces, layout: spec },
  } = chartSpec(kind, THEMES.light, true);
  const size = { width: 900, height: heightWithLegend(traces, 900, 540) };
  const scale = format === "png" ? 2 : 1;
  download(`${kind}.${format}`, await Plotly.toImage({ data: traces, layout: spec }, { format, scale, ...size }));
}

function buildActions(id, rows, toCsv, toLatex) {
  byId(`${id}-actions`).replaceChildren(
    ...(id === "points" ? [latexChoice()] : []),
    h("button", { type: "button", onclick: () => download(`${id}.csv`, csv(rows().map(toCsv))) }, "CSV"),
    h("button", { type: "button", onclick: () => download(`${id}.tex`, toLatex(rows())) }, "LaTeX"),
  );
}
