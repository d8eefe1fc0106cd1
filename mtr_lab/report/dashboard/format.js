// How numbers and names are written.

const ABSENT = "–";
const percent = (value) => (100 * value).toFixed(1).replace("100.0", "100");
const figure = (value) =>
  Math.abs(value) >= 99.95 ? value.toFixed(0) : value === 0 ? "0" : trimExponent(value.toPrecision(3));
const nats = (value) => (Math.abs(value) < 1 ? value.toFixed(3) : value.toPrecision(3));
const trimExponent = (text) => (text.includes("e") ? String(Number(text)) : text);
const grouped = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, "\u00a0"); // 1 000
const shown = (value, written) => (value == null ? ABSENT : written(value));

// Plotly interprets some HTML tags in its texts.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const MINUS = "−";
const signed = (metric, value) => {
  const text = metric.write(Math.abs(value));
  return Number(text) === 0 ? text : (value < 0 ? MINUS : "+") + text;
};
