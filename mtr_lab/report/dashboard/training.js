// The learning curves of training runs.

const CURVES = { train_loss: "Training loss", val_loss: "Held-out loss", val_top1: "Held-out top-1, %", val_miou: "Held-out mIoU, %", val_ap50: "Held-out AP50, %", lr: "Learning rate" };
/** The runs of the task in view, and those of tasks without results. */
const trainingsInView = () => data.trainings.filter((run) => run.task === state.task || !tasksNow().includes(run.task));
const curveTitle = (key) => CURVES[key] ?? key;
const curveScale = (key) => (curveTitle(key).endsWith("%") ? 100 : 1);

function trainingSpec(colours, legend) {
  const drawn = trainingsInView().filter((run) => run.curves[state.training]?.length);
  const scale = curveScale(state.training);
  const tones = Object.values(data.looks).map((look) => look[inDark() ? "on_dark" : "colour"]);
  const traces = drawn.map((run, i) => ({
    x: run.curves[state.training].map(([epoch]) => epoch),
    y: run.curves[state.training].map(([, value]) => scale * value),
    mode: "lines",
    name: plain(run.name),
    line: { width: 1.8, dash: DASHES[i % DASHES.length][0], color: tones.length ? tones[i % tones.length] : colours.ink },
    hovertemplate: `<b>${plain(run.name)}</b><br>%{y:.4g} after %{x} epochs<extra></extra>`,
  }));
  const named = legend || drawn.length > 1;
  const spec = layout("Epochs", curveTitle(state.training), colours, named);
  if (!legend) spec.legend = { orientation: "h", y: 1.02, yanchor: "bottom", font: { size: 11 } };
  return { drawn, figure: { data: traces, layout: spec } };
}

/** The section, and the choice of the curve; hidden without training runs. */
function drawTraining() {
  const runs = trainingsInView();
  byId("training-section").hidden = !runs.length;
  if (!runs.length) return;
  const present = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))];
  const known = Object.keys(CURVES);
  present.sort((a, b) => (known.indexOf(a) + 99) % 99 - (known.indexOf(b) + 99) % 99);
  if (!present.includes(state.training)) state.training = present[0];
  buildFigure("training", "", present.map((key) => ({ key, title: curveTitle(key) })));
  drawChart("training");
}
