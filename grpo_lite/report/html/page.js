"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 10;
  // Curves: the values under the pointer
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = (data.charts || {})[figure.dataset.chart];
    if (!chart) continue;
    showValues(figure, chart);
  }

  // Browsers of completions
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
          inRange(row.reward, form.low.value, form.high.value) && found(text, row.prompt, wordsOf(row), row.answer));
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
        return completionCard(row, browser.skip);
      },
    },
    heldout: {
      select(form) {
        const text = form.text.value.trim().toLowerCase(), kind = form.kind.value;
        const is = { all: () => true, improved: (b, t) => b === false && t, worse: (b, t) => b && t === false, both: (b, t) => b && t, none: (b, t) => b === false && t === false };
        return data.heldout.filter((row) => is[kind]((row.warm || row.base).right, row.trained.right) &&
          found(text, row.prompt, row.answer, wordsOf(row.base), row.warm ? wordsOf(row.warm) : "", wordsOf(row.trained)));
      },
      draw(row, browser) {
        return answersCard(row, browser.skip);
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
