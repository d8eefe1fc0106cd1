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
        { ...column("Picture", "resolution"), write: (p) => picture(p) ?? "" },
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
        write: (row) => {
          if (!row[metric.key]) return ABSENT;
          const { value, ci, significant } = row[metric.key];
          const ends = ci.map((end) => signed(metric, end)).join(" – ");
          return `${signed(metric, value)}${significant ? "*" : ""} (${ends})`;
        },
      })),
    ],
    rows,
  ).replace("95 % intervals", "95 % intervals of a paired bootstrap, * p < 0.05 after Holm's correction");
}

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
    h("button", { type: "button", onclick: () => download(`${id}.csv`, csv(rows().map(toCsv))) }, "CSV"),
    h("button", { type: "button", onclick: () => download(`${id}.tex`, toLatex(rows())) }, "LaTeX"),
  );
}
