// Tokens per block: the chart of all points, and the bars of one.

/** One line for each distinct list of token counts; points with equal schedules share it. */
function tokensSpec(colours, legend) {
  const traces = [],
    annotations = [];
  const drawn = visible.filter((point) => point.tokens.length);
  const room = 0.05 * Math.max(0, ...drawn.map((point) => point.tokens[0]));
  const blocks = Math.max(1, ...drawn.map((point) => point.tokens.length));
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
      text: Array(tokens.length + 1).fill(listed.map(plain).join("<br>")),
      hovertemplate: "<b>%{y} tokens</b><br>%{text}<extra></extra>",
    });
    const asked = [...new Set(members.map((point) => (point.unreduced ? "unreduced" : ratioName(point))))];
    const ends = asked.length > 2 ? `${asked[0]}, …` : asked.join(", ");
    if (tokens.length < blocks) continue; // lines of deeper models would cross the text
    if (annotations.some(({ y, text }) => text === plain(ends) || Math.abs(y - tokens.at(-1)) < room)) continue;
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
  const named = legend && traces.length <= 12; // with more, the ratios at the ends of the lines have to suffice
  for (const trace of traces) trace.showlegend = named;
  const spec = layout("Block, counted from 0", "Tokens entering the block", colours, named, { annotations });
  spec.margin.r = 16 + 7 * Math.max(8, ...annotations.map(({ text }) => text.length));
  spec.yaxis.rangemode = "tozero";
  spec.xaxis.tickformat = "d";
  spec.xaxis.range = [0, blocks];
  return { drawn, figure: { data: lists.size > MANY ? joined(traces) : traces, layout: spec } };
}

/** Lines of one look as one line with gaps: of a thousand results they are drawn ten times as fast. */
function joined(traces) {
  const looks = groupBy(traces, (trace) => JSON.stringify(trace.line));
  const chained = (members, key) => members.flatMap((trace) => [...trace[key], null]);
  return [...looks.values()].map((members) => {
    const all = Object.fromEntries(["x", "y", "customdata", "text"].map((key) => [key, chained(members, key)]));
    return { ...members[0], ...all, opacity: 0.4 };
  });
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
