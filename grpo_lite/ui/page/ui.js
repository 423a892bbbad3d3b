"use strict";
(() => {
  const token = new URLSearchParams(location.search).get("token") || "";
  const view = document.getElementById("view"), link = document.getElementById("link");
  const EVERY_MS = 1500;
  const gib = (bytes) => (bytes / 2 ** 30).toFixed(1) + " GiB";
  const percent = (share) => (100 * share).toFixed(1) + " %";
  const points = (share) => (share < 0 ? "−" : "+") + Math.abs(100 * share).toFixed(1);
  const add = (parent, ...children) => { parent.append(...children.filter(Boolean)); return parent; };
  const query = (values) => new URLSearchParams(values).toString();

  // The server's answers; null: nothing has changed since the last one.
  const tags = new Map();
  const call = async (path, options = {}) => {
    const headers = { Authorization: "Bearer " + token, ...options.headers };
    if (options.fresh) tags.delete(path);
    if (!options.method && tags.has(path)) headers["If-None-Match"] = tags.get(path);
    let answer;
    try {
      answer = await fetch(path, { method: options.method || "GET", body: options.body, headers });
    } catch {
      link.className = "off"; link.textContent = "the server does not answer";
      return null;
    }
    link.className = "on"; link.textContent = "live";
    if (answer.status === 304) return null;
    if (answer.headers.has("ETag")) tags.set(path, answer.headers.get("ETag"));
    if (answer.status === 403) throw new Error(await answer.text());
    const data = await answer.json().catch(() => ({ error: "the server answers " + answer.status }));
    if (data.error) throw new Error(data.error);
    return data;
  };
  const failure = (error) => make("p", "error", error.message);

  // Parts of a view
  const meter = (share) => {
    const box = make("div", "meter"), bar = make("i");
    bar.style.width = (100 * share).toFixed(2) + "%";
    box.append(bar);
    return box;
  };
  const state = (name) => make("span", "state " + name, name);
  const between = (...texts) => add(make("div", "between"), ...texts.filter(Boolean).map((text) => make("span", "", text)));
  const pure = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const spark = (values) => {
    const low = Math.min(...values), span = Math.max(...values) - low || 1;
    const at = values.map((y, i) => (100 * i / (values.length - 1)).toFixed(2) + "," + (40 - 36 * (y - low) / span).toFixed(2));
    const svg = pure("svg", { class: "spark", viewBox: "0 0 100 44", preserveAspectRatio: "none", "aria-hidden": "true" });
    return add(svg, pure("polyline", { points: at.join(" ") }));
  };
  const heading = (title, id, ...rest) => {
    const section = make("section");
    section.id = id;
    return add(section, make("h2", "", title), ...rest);
  };

  // The verdict of a run, as on its report
  const verdict = (headline, prompts) => {
    const box = make("div", "figures");
    if (!headline.rates) return add(box, add(make("p", "big"), make("strong", "", headline.label)));
    const big = make("p", headline.rates.length > 2 ? "big three" : "big");
    headline.rates.forEach((rate, i) => {
      if (i) big.append(" ", make("em", "", "→"), " ");
      big.append(make(i === headline.rates.length - 1 ? "strong" : "span", "", percent(rate.rate)));
    });
    add(box, big, make("p", "chip", headline.label));
    box.append(make("p", "delta", points(headline.difference) + " points, 95 % interval " + points(headline.low) + " to " +
      points(headline.high) + " · " + headline.n + " " + prompts));
    if (headline.warmup) box.append(make("p", "delta", headline.warmup));
    return box;
  };
  const scale = (rates) => {
    const box = make("div", "scale");
    for (const rate of rates) {
      const row = make("div", "row " + rate.name), track = make("div", "track"), band = make("i", "band"), dot = make("i", "dot");
      band.style.left = 100 * rate.low + "%"; band.style.width = 100 * (rate.high - rate.low) + "%";
      dot.style.left = 100 * rate.rate + "%";
      box.append(add(row, make("span", "", rate.name), add(track, band, dot)));
    }
    const track = make("div", "track");
    for (const [at, text] of [[0, "0"], [50, "50 %"], [100, "100 %"]]) {
      const mark = make("b", "", text);
      mark.style.left = at + "%";
      track.append(mark);
    }
    box.append(add(make("div", "row ticks"), make("span"), track));
    return box;
  };
  const sentence = (line) => line[0].toUpperCase() + line.slice(1) + ".";
  const findingList = (findings, clean) => {
    if (!findings.length) return make("p", clean.includes("nothing found wrong") ? "fine" : "fine unknown", sentence(clean));
    const list = make("ul", "findings");
    for (const finding of findings) {
      const item = add(make("li"), make("p", "", finding.sentence));
      if (finding.override) {
        const copy = make("button", "", "copy");
        copy.type = "button"; copy.dataset.copy = finding.override;
        item.append(add(make("p", "try"), "Try ", make("code", "", finding.override), " ", copy));
      }
      list.append(item);
    }
    return list;
  };
  const table = (head, rows, mono) => {
    const box = make("div", "card scroll wide"), own = make("table"), top = make("tr"), body = make("tbody");
    add(top, make("th"), ...head.map((name) => make("th", "", name)));
    for (const [name, cells] of rows) {
      add(body, add(make("tr"), make("th", mono, name), ...cells.map((cell) => make("td", mono, cell))));
    }
    return add(box, add(own, add(make("thead"), top), body));
  };

  // Charts, drawn from the data that the report's are drawn from, at the places of its axes
  const WIDTH = 380, HEIGHT = 225, TOP = 0.05 * HEIGHT, BOTTOM = 0.86 * HEIGHT, SMOOTH_FROM = 24;
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
    const marks = [];
    for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i += 1) marks.push(+(i * step).toPrecision(10));
    return marks;
  };
  const average = (values, width) => {
    let total = 0;
    return values.map((value, i) => {
      total += value - (i >= width ? values[i - width] : 0);
      return total / Math.min(i + 1, width);
    });
  };
  const short = (value) => Math.abs(value) >= 10000 ? value / 1000 + "k" : String(value);
  const drawChart = (chart) => {
    const figure = make("figure", "card chart"), caption = make("figcaption"), plot = make("div", "plot");
    figure.dataset.chart = chart.key;
    add(caption, make("h3", "", chart.title), make("p", "", chart.note));
    const svg = pure("svg", { viewBox: "0 0 " + WIDTH + " " + HEIGHT, role: "img", "aria-hidden": "true" });
    const values = chart.lines.flatMap((line) => [...line.y, ...line.low, ...line.high]);
    let low = Math.min(...values), high = Math.max(...values);
    const margin = 0.08 * (high - low) || 0.05 * Math.abs(high) || 0.5;
    [low, high] = chart.top === null ? [low - margin, high + margin] : [-0.03 * chart.top, 1.05 * chart.top];
    const x = (step) => WIDTH * (chart.left + chart.width * (step - chart.low) / (chart.high - chart.low));
    const y = (value) => BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low);
    const path = (steps, ys) => steps.map((step, i) => x(step).toFixed(1) + "," + y(ys[i]).toFixed(1)).join(" ");
    for (const mark of ticks(low, high, 5)) {
      svg.append(pure("line", { class: "gridline", x1: WIDTH * chart.left, x2: WIDTH * (chart.left + chart.width), y1: y(mark), y2: y(mark) }));
      svg.append(pure("text", { x: WIDTH * chart.left - 6, y: y(mark) + 4.5, "text-anchor": "end" }, short(mark)));
    }
    for (const mark of ticks(chart.low, chart.high, 6).filter(Number.isInteger)) {
      svg.append(pure("text", { x: x(mark), y: BOTTOM + 18, "text-anchor": "middle" }, short(mark)));
    }
    chart.lines.forEach((line, order) => {
      const slot = line.slot === null ? order : line.slot, colour = slot % 6, dash = " dash" + Math.floor(slot / 6) % 3;
      if (line.low.length) {
        const band = path([...line.x, ...[...line.x].reverse()], [...line.low, ...[...line.high].reverse()]);
        svg.append(pure("polygon", { class: "f" + colour, points: band }));
      }
      const smooth = line.y.length >= SMOOTH_FROM;
      svg.append(pure("polyline", { class: "l" + colour + dash + (smooth ? " raw" : ""), points: path(line.x, line.y) }));
      if (smooth) {
        const bold = average(line.y, Math.max(5, Math.floor(line.y.length / 20)));
        svg.append(pure("polyline", { class: "l" + colour + dash, points: path(line.x, bold) }));
      }
      if (line.y.length <= 16) {
        line.x.forEach((step, i) => svg.append(pure("circle", { class: "f" + colour, cx: x(step), cy: y(line.y[i]), r: 3.2 })));
      }
    });
    const cross = make("div", "cross"), tip = make("div", "tip");
    cross.hidden = tip.hidden = true;
    add(figure, caption, add(plot, svg, cross, tip));
    if (chart.lines.length > 1 || chart.lines[0].slot !== null) {
      const names = make("div", "names");
      chart.lines.forEach((line, order) => {
        const slot = line.slot === null ? order : line.slot;
        names.append(add(make("span"), make("i", "c" + slot % 6), line.name));
      });
      figure.append(names);
    }
    showValues(figure, chart);
    return figure;
  };
  const chartGrid = (charts) => add(make("div", "charts"), ...charts.map(drawChart));

  // Runs
  const runCard = (run) => {
    const card = make("a", "card run " + (run.headline ? run.headline.tone : ""));
    card.href = "#/run/" + encodeURIComponent(run.name);
    add(card, add(make("div", "top"), make("h2", "", run.name), state(run.state)));
    if (run.error) return add(card, make("p", "", run.error));
    add(card, make("p", "", run.description), make("p", "mono", run.model));
    const rates = run.headline.rates;
    if (rates) card.append(make("p", "verdict", rates.map((rate) => percent(rate.rate)).join(" → ")), make("p", "", run.headline.label));
    else card.append(meter(run.share), between(run.count, run.left && run.left + " left"));
    if (run.curve.length > 1) card.append(spark(run.curve));
    card.append(between(run.value, run.findings ? run.findings + (run.findings > 1 ? " findings" : " finding") : ""));
    return card;
  };
  const runsView = () => {
    const list = make("div", "runs"), note = make("p", "lead", "");
    view.append(make("h1", "", "Runs"), note, list);
    return async (fresh) => {
      const data = await call("/api/runs", { fresh });
      if (!data) return;
      note.textContent = data.folder;
      list.replaceChildren(...data.runs.map(runCard));
      if (!data.runs.length) list.append(make("p", "empty", "No run yet. One that begins appears here: grpo-lite train quickstart"));
    };
  };

  // One run
  const runView = (name) => {
    const top = make("div"), tiles = make("dl", "tiles"), doctor = heading("What the doctor found", "doctor", make("div"));
    const curves = heading("Curves", "curves", make("div")), rows = make("div", "rows"), search = make("input");
    search.type = "search"; search.placeholder = "in prompts and completions"; search.name = "text";
    const filters = add(make("form", "filters"), add(make("label", "grow"), "Search", search));
    const order = make("select");
    for (const [value, text] of [["latest", "latest"], ["best", "highest reward"], ["worst", "lowest reward"]]) {
      const option = make("option", "", text);
      option.value = value;
      order.append(option);
    }
    filters.prepend(add(make("label"), "Order", order));
    const samples = heading("Latest completions", "completions", filters, rows);
    view.append(top, tiles, doctor, curves, samples);
    let latest = [];
    const drawRows = () => {
      const text = search.value.trim().toLowerCase();
      const chosen = latest.filter((row) => (row.prompt + "\n" + wordsOf(row)).toLowerCase().includes(text));
      if (order.value === "best") chosen.sort((a, b) => b.reward - a.reward);
      if (order.value === "worst") chosen.sort((a, b) => a.reward - b.reward);
      const skip = sharedLines(latest.map((row) => row.prompt));
      rows.replaceChildren(...chosen.slice(0, 24).map((row) => completionCard(row, skip)));
    };
    filters.addEventListener("input", drawRows);
    filters.addEventListener("submit", (event) => event.preventDefault());
    return async (fresh) => {
      const run = await call("/api/run?" + query({ run: name }), { fresh });
      if (!run || !top.isConnected) return;  // another view is shown by now
      document.title = run.count + " · " + run.name + " · grpo_lite";
      const lead = make("p", "lead", run.description + " · ");
      lead.append(make("span", "mono", run.model));
      const hero = make("div", "hero card " + run.headline.tone);
      if (run.headline.rates) add(hero, verdict(run.headline, "held-out prompts, greedy"), scale(run.headline.rates));
      else {
        const figures = add(make("div", "figures"), add(make("p", "big"), make("strong", "", run.count)));
        if (run.value) figures.append(make("p", "delta", run.value));
        add(hero, figures, add(make("div"), meter(run.share), between(percent(run.share), run.left ? run.left + " left" : run.state)));
      }
      const actions = make("div", "actions"), report = make("a", "button quiet", "Full report");
      report.href = "/report?" + query({ run: name, key: run.report_key }); report.target = "_blank"; report.rel = "noopener noreferrer";
      actions.append(report);
      if (run.trained) {
        const ask = make("a", "button quiet", "Ask this model");
        ask.href = "#/ask/" + encodeURIComponent(name);
        actions.append(ask);
      }
      top.replaceChildren(add(make("div", "headrow"), make("h1", "", run.name), state(run.state)), lead, hero, actions);
      tiles.replaceChildren(...run.tiles.map(([key, value]) => add(make("div", "card"), make("dt", "", key), make("dd", "", value))));
      doctor.lastChild.replaceChildren(findingList(run.findings, run.clean));
      if (run.expected) doctor.lastChild.append(make("p", "", sentence(run.expected)));
      curves.hidden = !run.charts.length;
      curves.lastChild.replaceChildren(chartGrid(run.charts));
      samples.hidden = !run.completions.length;
      latest = run.completions;
      drawRows();
    };
  };

  // Compare
  const compareView = () => {
    const choose = make("form", "choose"), result = make("div"), chosen = new Set();
    view.append(make("h1", "", "Compare"), make("p", "lead", "Choose two or more runs; each has one colour in all curves."), choose, result);
    let wanted = 0;
    const draw = async () => {
      const mine = wanted += 1;
      if (chosen.size < 2) return result.replaceChildren();
      let data;
      try {
        data = await call("/api/compare?" + new URLSearchParams([...chosen].map((name) => ["run", name])), { fresh: true });
      } catch (error) {
        if (mine === wanted) result.replaceChildren(failure(error));
        return;
      }
      if (!data || mine !== wanted) return;  // other runs have been ticked since
      const sides = make("div", "sides");
      data.names.forEach((name, i) => {
        const headline = data.headlines[i], card = make("div", "hero card " + headline.tone);
        add(card, make("h2", "", name), verdict(headline, "prompts"), headline.rates && scale(headline.rates));
        sides.append(card);
      });
      const same = make("p", "fine", "All runs have the same recipe.");
      result.replaceChildren(sides, heading("Curves", "curves", chartGrid(data.charts)),
        heading("Figures", "figures", table(data.names, data.table)),
        heading("Where the recipes differ", "recipes", data.differences.length ? table(data.names, data.differences, "mono") : same));
    };
    choose.addEventListener("change", (event) => {
      if (event.target.checked) chosen.add(event.target.value); else chosen.delete(event.target.value);
      draw();
    });
    return async (fresh) => {
      const data = await call("/api/runs", { fresh });
      if (!data) return;
      choose.replaceChildren(...data.runs.filter((run) => !run.error).map((run) => {
        const box = make("input"), label = make("label");
        box.type = "checkbox"; box.value = run.name; box.checked = chosen.has(run.name);
        return add(label, box, run.name);
      }));
      if (data.runs.length < 2) choose.append(make("p", "empty", "There are fewer than two runs here."));
    };
  };

  // Plan
  const labelled = (text, control, shownValue) => {
    const label = make("label", "", text);
    return add(label, shownValue, control);
  };
  const choice = (name, pairs) => {
    const select = make("select");
    select.name = name;
    for (const [value, text] of pairs) {
      const option = make("option", "", text);
      option.value = value;
      select.append(option);
    }
    return select;
  };
  const slider = (name) => {
    const input = make("input");
    input.type = "range"; input.name = name;
    return input;
  };
  const planView = () => {
    const form = make("form", "form"), result = make("div");
    view.append(make("h1", "", "Plan"), make("p", "lead", "What a card's memory would hold: counted, not run. The sliders change the recipe."), form, result);
    const group = slider("group"), completion = slider("completion"), groupText = make("b"), completionText = make("b");
    let groups = [], moved = {}, wanted = 0;
    const draw = async () => {
      const mine = wanted += 1;
      const values = { recipe: form.elements.recipe.value, card: form.elements.card.value, ...moved };
      let plan;
      try {
        plan = await call("/api/plan?" + query(values), { fresh: true });
      } catch (error) {
        if (mine === wanted) result.replaceChildren(failure(error));
        return;
      }
      if (!plan || mine !== wanted) return;  // a later one is on its way
      groups = plan.groups;
      group.min = 0; group.max = groups.length - 1; group.value = groups.indexOf(plan.group);
      completion.min = completion.step = plan.longest < 64 ? 1 : 32; completion.max = plan.longest;
      completion.value = plan.completion;
      groupText.textContent = plan.group + " completions a prompt";
      completionText.textContent = plan.completion + " tokens";
      result.replaceChildren(...planParts(plan));
    };
    form.addEventListener("input", (event) => {
      // A slider that was not moved sends nothing: its steps may pass over the recipe's own value.
      if (event.target.name === "recipe") moved = {};
      if (event.target === group && groups.length) {
        moved.group = groups[+group.value];
        groupText.textContent = moved.group + " completions a prompt";
      }
      if (event.target === completion) {
        moved.completion = completion.value;
        completionText.textContent = moved.completion + " tokens";
      }
      draw();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    return async () => {
      if (form.elements.length) return;
      const data = await call("/api/choices", { fresh: true });
      if (!data) return;
      const recipes = choice("recipe", data.recipes.map((name) => [name, name]));
      if (data.recipes.includes("gsm8k")) recipes.value = "gsm8k";
      add(form, labelled("Recipe", recipes), labelled("GPU", choice("card", data.cards.map((card) => [card.key, card.name]))),
        labelled("num_generations: the group", group, groupText), labelled("max_completion_length", completion, completionText));
      await draw();
    };
  };
  const planParts = (plan) => {
    const hero = make("div", "hero card " + (plan.fits ? "good" : "bad")), figures = make("div", "figures");
    add(figures, add(make("p", "big"), make("strong", "", gib(plan.needed)), make("span", "", " of " + gib(plan.memory))));
    add(figures, make("p", "chip", plan.fits ? "fits" : "does not fit"), make("p", "delta", plan.model + " on " + plan.card + " · prompts up to " + plan.prompt + " tokens"));
    const spare = plan.memory - plan.needed;
    add(hero, figures, add(make("div"), meter(Math.min(1, plan.needed / plan.memory)), between(gib(Math.abs(spare)) + (spare < 0 ? " too much" : " to spare"))));
    if (!plan.fits) hero.append(make("p", "sentence", plan.advice));
    const whole = Math.max(plan.memory, ...plan.phases.map((phase) => phase.total));
    const sizes = new Map();
    for (const [what, bytes] of plan.phases.flatMap((phase) => phase.items)) sizes.set(what, Math.max(bytes, sizes.get(what) || 0));
    const main = [...sizes.entries()].sort((a, b) => b[1] - a[1]).slice(0, 6).map(([what]) => what);
    const colour = (what) => "c" + (main.includes(what) ? main.indexOf(what) : 6);
    const card = make("div", "card"), legend = make("ul", "legend");
    for (const phase of plan.phases) {
      const row = make("div", "phase"), stack = make("div", "stack"), head = make("div", "between");
      for (const [what, bytes] of phase.items) {
        const part = make("i", colour(what));
        part.style.width = 100 * bytes / whole + "%"; part.title = what + ": " + gib(bytes);
        stack.append(part);
      }
      card.append(add(row, add(head, make("b", "", phase.name), make("span", "", gib(phase.total) + (phase.divisible ? ", less where less is free" : ""))), stack));
    }
    for (const what of main) legend.append(add(make("li"), make("i", colour(what)), what, " ", make("span", "", "up to " + gib(sizes.get(what)))));
    if (sizes.size > main.length) legend.append(add(make("li"), make("i", "c6"), "smaller parts"));
    card.append(legend);
    const copy = make("button", "", "copy");
    copy.type = "button"; copy.dataset.copy = plan.command;
    const notes = make("ul", "plain");
    for (const line of plan.chosen) notes.append(make("li", "", "chosen: " + line));
    for (const line of plan.notes) notes.append(make("li", "", line));
    notes.append(make("li", "", "By arithmetic, checked against counted tensor bytes on a CPU; not yet measured on a GPU."));
    return [hero, heading("Where the memory goes", "phases", card),
      heading("Train it like this", "command", add(make("p", "command"), make("code", "", plan.command), copy), notes)];
  };

  // Ask
  const askView = (name) => {
    const form = make("form", "form card"), answers = make("div", "answers"), question = make("textarea"), go = make("button", "main", "Ask");
    question.name = "question"; question.required = true; question.placeholder = "A question as the run's prompts ask it";
    const temperature = make("input");
    temperature.type = "number"; temperature.min = 0; temperature.step = 0.1; temperature.value = 0; temperature.name = "temperature";
    view.append(make("h1", "", "Ask"), make("p", "lead", "The base and the trained model answer the same question. The first answer waits for the model to load; it stays in memory until another run is asked or this server ends."), form, answers);
    const runs = choice("run", []);
    let asking = false;
    const setAsking = (now) => { asking = now; go.disabled = asking || !runs.options.length; };
    const whole = labelled("Question", question);
    whole.className = "whole";
    add(form, labelled("Run", runs), labelled("Temperature (0: greedy)", temperature), whole, add(make("div", "whole"), go));
    question.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (asking || !runs.value) return;
      const asked = { run: runs.value, question: question.value, temperature: +temperature.value };
      const card = make("article", "card item"), pair = make("div", "sidepair"), meta = make("div", "meta");
      add(card, add(meta, make("b", "", asked.run), make("span", "", "answering")), make("pre", "prompt", asked.question), pair);
      answers.prepend(card);
      setAsking(true);
      try {
        const data = await call("/api/ask", { method: "POST", body: JSON.stringify(asked), headers: { "Content-Type": "application/json" } });
        if (!data) throw new Error("the server does not answer");
        meta.lastChild.textContent = data.seconds + " s";
        for (const side of ["base", "trained"]) {
          pair.append(add(make("div"), make("small", "", side), make("pre", "", shown(data.answers[side]))));
        }
      } catch (error) {
        meta.lastChild.textContent = "";
        card.append(failure(error));
      }
      setAsking(false);
    });
    return async (fresh) => {
      const data = await call("/api/runs", { fresh });
      if (!data) return;
      const trained = data.runs.filter((run) => run.trained).map((run) => run.name);
      const offered = Array.from(runs.options, (option) => option.value), before = runs.value || name;
      if (JSON.stringify(trained) !== JSON.stringify(offered)) {
        runs.replaceChildren(...choice("run", trained.map((each) => [each, each])).children);
        if (trained.includes(before)) runs.value = before;
      }
      setAsking(asking);
      if (!trained.length) question.placeholder = "No run here is trained yet.";
    };
  };

  // The view of the address, renewed while it is looked at
  const views = { "": runsView, run: runView, compare: compareView, plan: planView, ask: askView };
  let refresh = async () => {}, shownView = 0, busy = false;
  const tick = async (fresh) => {
    const own = shownView;
    if (busy && !fresh) return;
    busy = true;
    try {
      await refresh(fresh);
      if (own === shownView) view.querySelector(":scope > .error.poll")?.remove();
    } catch (error) {
      if (own === shownView && !view.querySelector(":scope > .error.poll")) {
        const box = failure(error);
        box.classList.add("poll");
        view.prepend(box);
      }
    }
    busy = false;
  };
  const open = () => {
    const [kind, name] = location.hash.replace(/^#\/?/, "").split("/");
    shownView += 1;
    document.title = "grpo_lite runs";
    view.replaceChildren();
    window.scrollTo(0, 0);
    for (const each of document.querySelectorAll("nav a")) {
      const own = each.getAttribute("href").replace(/^#\/?/, "");
      if (own === (kind === "run" ? "" : kind)) each.setAttribute("aria-current", "page"); else each.removeAttribute("aria-current");
    }
    refresh = (views[kind] || runsView)(decodeURIComponent(name || ""));
    tick(true);
  };
  window.addEventListener("hashchange", open);
  setInterval(() => { if (!document.hidden) tick(false); }, EVERY_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(false); });
  open();
})();
