"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 10;
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;  // never HTML: completions are the model's words
    return node;
  };
  const shown = (text) => text ? text.replace(/\n+$/, (ends) => " " + "↵".repeat(ends.length)) : "(empty)";
  const number = (value) => value === null || value === undefined ? "–" : String(+(+value).toFixed(3));

  // Curves: the values under the pointer
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = (data.charts || {})[figure.dataset.chart];
    if (!chart) continue;
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
  }

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

  // Browsers of completions. Lines that all prompts begin with (worked examples) are shown as an ellipsis.
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
  const found = (text, ...where) => !text || where.some((value) => value && value.toLowerCase().includes(text));
  const inRange = (value, low, high) => value === null ? low === "" && high === "" :
    (low === "" || value >= +low) && (high === "" || value <= +high);

  const improvement = () => {  // per prompt: mean reward of its last step minus that of its first
    const byPrompt = new Map();
    for (const row of data.completions.filter((each) => each.reward !== null)) {
      if (!byPrompt.has(row.prompt)) byPrompt.set(row.prompt, new Map());
      const steps = byPrompt.get(row.prompt);
      if (!steps.has(row.step)) steps.set(row.step, []);
      steps.get(row.step).push(row.reward);
    }
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length, rises = new Map();
    for (const [prompt, steps] of byPrompt) {
      const order = [...steps.keys()].sort((a, b) => a - b);
      if (order.length > 1) rises.set(prompt, mean(steps.get(order.at(-1))) - mean(steps.get(order[0])));
    }
    return rises;
  };

  const browsers = {
    completions: {
      select(form) {
        const text = form.text.value.trim().toLowerCase();
        let rows = data.completions.filter((row) => inRange(row.step, form.from.value, form.to.value) &&
          inRange(row.reward, form.low.value, form.high.value) && found(text, row.prompt, row.text, row.answer));
        const order = form.order.value;
        if (order === "latest") rows = rows.slice().sort((a, b) => b.step - a.step);
        if (order === "best") rows = rows.slice().sort((a, b) => b.reward - a.reward || b.step - a.step);
        if (order === "worst") rows = rows.slice().sort((a, b) => a.reward - b.reward || b.step - a.step);
        if (order === "improved") {
          const rises = improvement();
          rows = rows.filter((row) => rises.has(row.prompt)).sort((a, b) =>
            rises.get(b.prompt) - rises.get(a.prompt) || (a.prompt < b.prompt ? -1 : a.prompt > b.prompt ? 1 : a.step - b.step));
        }
        return rows;
      },
      draw(row, browser) {
        const card = make("article", "card item"), meta = make("div", "meta");
        meta.append(make("b", "", "reward " + number(row.reward)), make("span", "", "step " + row.step));
        const parts = Object.entries(row.parts);
        if (parts.length > 1) for (const [name, value] of parts) meta.append(make("span", "", name + " " + number(value)));
        if (row.tokens) meta.append(make("span", "", row.tokens + " tokens" + (row.cut ? ", cut off" : "")));
        if (row.answer !== null) meta.append(make("span", "", "gold " + row.answer));
        card.append(meta, promptBox(row.prompt, browser.skip), make("pre", "", shown(row.text)));
        return card;
      },
    },
    heldout: {
      select(form) {
        const text = form.text.value.trim().toLowerCase(), kind = form.kind.value;
        const is = { all: () => true, improved: (b, t) => b === false && t, worse: (b, t) => b && t === false, both: (b, t) => b && t, none: (b, t) => b === false && t === false };
        return data.heldout.filter((row) => is[kind]((row.warm || row.base).right, row.trained.right) &&
          found(text, row.prompt, row.answer, row.base.text, row.warm ? row.warm.text : "", row.trained.text));
      },
      draw(row, browser) {
        const card = make("article", "card item"), meta = make("div", "meta"), pair = make("div", "sidepair");
        if (row.answer !== null) meta.append(make("span", "", "gold " + row.answer));
        for (const side of ["base", "warm", "trained"].filter((name) => row[name])) {
          const right = row[side].right, box = make("div", right ? "right" : "wrong");
          const form = right && !row[side].strict ? ", not in the required form" : "";
          box.append(make("small", "", side + " · " + (right === null ? "no usable gold answer" : right ? "right" + form : "wrong")));
          box.append(make("pre", "", shown(row[side].text)));
          pair.append(box);
        }
        card.append(meta, promptBox(row.prompt, browser.skip), pair);
        return card;
      },
    },
  };

  for (const form of document.querySelectorAll("[data-browser]")) {
    const name = form.dataset.browser, browser = browsers[name];
    const rows = document.querySelector('[data-rows="' + name + '"]'), more = document.querySelector('[data-more="' + name + '"]');
    browser.skip = sharedLines(data[name].map((row) => row.prompt));
    let chosen = [], shown = 0;
    const add = () => {
      rows.append(...chosen.slice(shown, shown + PAGE).map((row) => browser.draw(row, browser)));
      shown = Math.min(chosen.length, shown + PAGE);
      more.hidden = shown >= chosen.length;
    };
    const renew = () => {
      chosen = browser.select(form.elements); shown = 0; rows.replaceChildren(); add();
      form.querySelector("output").textContent = chosen.length + " of " + data[name].length;
    };
    form.addEventListener("input", renew);
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", add);
    renew();
  }
})();
