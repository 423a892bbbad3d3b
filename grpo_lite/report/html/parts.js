"use strict";
// What the scripts of all pages draw with. Text is inserted as text, never as HTML: completions are the model's words.
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const shown = (text) => text ? text.replace(/\n+$/, (ends) => " " + "↵".repeat(ends.length)) : "(empty)";
const number = (value) => value === null || value === undefined ? "–" : String(+(+value).toFixed(3));

// The values of a chart under the pointer
const showValues = (figure, chart) => {
  const plot = figure.querySelector(".plot"), cross = figure.querySelector(".cross"), tip = figure.querySelector(".tip");
  const steps = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const hide = () => { cross.hidden = tip.hidden = true; };
  const move = (event) => {
    const box = plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - chart.left) / chart.width;
    const wanted = chart.low + share * (chart.high - chart.low);
    const step = steps.reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    const at = 100 * (chart.left + chart.width * (step - chart.low) / (chart.high - chart.low || 1));
    const values = chart.lines.filter((line) => line.x.includes(step))
      .map((line) => (line.name ? line.name + " " : "") + number(line.y[line.x.indexOf(step)]));
    tip.textContent = "step " + step + ": " + values.join(" · ");
    cross.hidden = tip.hidden = false;
    cross.style.left = at + "%";
    const half = tip.offsetWidth / 2, centre = at / 100 * box.width;
    tip.style.left = Math.min(Math.max(centre, half), Math.max(half, box.width - half)) + "px";
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", hide);
};

// Copy buttons
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const done = () => { button.textContent = "copied"; };
  const byHand = () => {
    const area = make("textarea"); area.value = button.dataset.copy; document.body.append(area);
    area.select(); document.execCommand("copy"); area.remove(); done();
  };
  if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(button.dataset.copy).then(done, byHand);
  else byHand();
});

// Completions. Lines that all prompts begin with (worked examples) are shown as an ellipsis.
const sharedLines = (prompts) => {
  if (prompts.length < 2) return 0;
  let [first, ...rest] = prompts, length = first.length;
  for (const other of rest) {
    let i = 0;
    while (i < length && first[i] === other[i]) i += 1;
    length = i;
  }
  return first.lastIndexOf("\n", length - 1) + 1;
};
const promptBox = (prompt, skip) => {
  const box = make("pre", "prompt", (skip ? "… " : "") + prompt.slice(skip));
  if (skip) box.title = prompt;
  return box;
};
// What the model said: its text, or the turns of an episode, each call with its result below.
const TURNS = { said: "says", call: "calls", result: "result", failed: "error" };
const answerBox = (row) => {
  if (!row.turns) return make("pre", "", shown(row.text));
  const list = make("ol", "turns");
  for (const [kind, text] of row.turns) {
    const turn = make("li", kind);
    turn.append(make("small", "", TURNS[kind]), make("pre", "", shown(text)));
    list.append(turn);
  }
  return list;
};
const wordsOf = (row) => row.turns ? row.turns.map((turn) => turn[1]).join("\n") : row.text;
const completionCard = (row, skip) => {
  const card = make("article", "card item"), meta = make("div", "meta");
  meta.append(make("b", "", "reward " + number(row.reward)), make("span", "", "step " + row.step));
  const parts = Object.entries(row.parts);
  if (parts.length > 1) for (const [name, value] of parts) meta.append(make("span", "", name + " " + number(value)));
  if (row.tokens) meta.append(make("span", "", row.tokens + " tokens" + (row.cut ? ", cut off" : "")));
  if (row.answer !== null) meta.append(make("span", "", "gold " + row.answer));
  card.append(meta, promptBox(row.prompt, skip), answerBox(row));
  return card;
};
const answersCard = (row, skip) => {
  const card = make("article", "card item"), meta = make("div", "meta"), pair = make("div", "sidepair");
  if (row.answer !== null) meta.append(make("span", "", "gold " + row.answer));
  for (const side of ["base", "warm", "trained"].filter((name) => row[name])) {
    const right = row[side].right, box = make("div", right ? "right" : "wrong");
    const form = right && !row[side].strict ? ", not in the required form" : "";
    box.append(make("small", "", side + " · " + (right === null ? "no usable gold answer" : right ? "right" + form : "wrong")));
    box.append(answerBox(row[side]));
    pair.append(box);
  }
  card.append(meta, promptBox(row.prompt, skip), pair);
  return card;
};
