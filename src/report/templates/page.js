"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const made = (name, text, parent) => {
    const element = document.createElement(name);
    element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };

  // Bokeh lies in the page in compressed form; its text has a hash in the page's policy, so it may run.
  async function library() {
    const bytes = Uint8Array.from(atob(by("library").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    made("script", await new Response(stream).text(), document.head);
    Bokeh.logger.set_level("warn");
  }

  // Charts are drawn when they come into sight.
  const draw = (element) => Bokeh.embed.embed_item(data.charts[element.dataset.chart], element);
  const all = [...document.querySelectorAll(".chart")];
  if (all.length) library().then(() => {
    const sight = new IntersectionObserver((entries) => {
      for (const entry of entries.filter((e) => e.isIntersecting)) {
        sight.unobserve(entry.target);
        draw(entry.target);
      }
    }, { rootMargin: "200px" });
    for (const element of all) sight.observe(element);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const element of all.filter((e) => e.firstChild)) { // canvases do not follow the style sheet
      element.replaceChildren();
      draw(element);
    }
  });

  // The curves whose name has the text; all groups are open while there is one.
  const filter = by("filter");
  if (filter) {
    const groups = [...document.querySelectorAll("details.group")];
    const opened = groups.map((group) => group.open);
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      groups.forEach((group, index) => {
        const figures = [...group.querySelectorAll("figure")];
        for (const figure of figures) figure.hidden = !figure.dataset.name.toLowerCase().includes(wanted);
        group.hidden = figures.every((figure) => figure.hidden);
        group.open = wanted ? true : opened[index];
      });
    });
  }

  // The answers before and after, two at a time.
  const pairs = [...document.querySelectorAll("#answers article")];
  if (by("answers-on")) {
    let shown = pairs, first = 0;
    const show = () => {
      for (const pair of pairs) pair.hidden = true;
      for (const pair of shown.slice(first, first + 2)) {
        pair.hidden = false;
        by("answers").append(pair);
      }
      by("answers-place").textContent = `${first + 1} of ${pairs.length}`;
    };
    const turn = (by_) => { first = (first + by_ + pairs.length + (pairs.length % 2)) % (pairs.length + (pairs.length % 2)); show(); };
    by("answers-on").addEventListener("click", () => turn(2));
    by("answers-back").addEventListener("click", () => turn(-2));
    by("answers-order").addEventListener("change", (event) => {
      const sign = { given: 0, gain: -1, loss: 1 }[event.target.value];
      shown = sign ? [...pairs].sort((a, b) => sign * (a.dataset.gain - b.dataset.gain)) : pairs;
      first = 0;
      show();
    });
  }

  // The token view.
  if (!data.tokens || !data.tokens.tables.length) return;
  const { tables, quantities } = data.tokens;
  const pick = { table: by("token-table"), row: by("token-row"), quantity: by("token-quantity") };
  const title = Object.fromEntries(quantities.map((q) => [q.name, q]));
  const sample = () => tables[pick.table.selectedIndex].rows[pick.row.selectedIndex];
  const format = (x) => typeof x === "number" ? String(Number(x.toPrecision(4))) : String(x);
  const centered = (name, x) => name === "ratio" ? Math.log(x) : x;

  function tint(button, name, x, most) {
    const value = centered(name, Number(x));
    button.style.setProperty("--tint", value < 0 ? "var(--low)" : "var(--high)");
    button.style.setProperty("--weight", `${Math.round(Math.min(1, Math.abs(value) / most) * 70) || 0}%`);
  }

  function color() {
    const name = pick.quantity.value, { tokens } = sample();
    if (!name || !tokens[name]) return;
    const sizes = tables.flatMap((t) => t.rows).flatMap((r) => r.tokens[name] || [])
      .map((x) => Math.abs(centered(name, Number(x)))).filter(Number.isFinite).sort((a, b) => a - b);
    const most = sizes[Math.floor(sizes.length * 0.98)] || sizes.at(-1) || 1; // of all samples, so that colors compare
    by("token-text").querySelectorAll(".token").forEach((b, i) => tint(b, name, tokens[name][i], most));
    const far = name === "ratio" ? `${format(Math.exp(-most))} and ${format(Math.exp(most))}` : format(most);
    by("token-about").textContent = `${title[name].title} (${title[name].unit}). Orange: above ${name === "ratio" ? 1 : 0}, blue: below; full color at ${far}.`;
  }

  function choose(button) {
    const buttons = [...by("token-text").children], index = buttons.indexOf(button), { tokens } = sample();
    for (const other of buttons) { other.removeAttribute("aria-current"); other.tabIndex = -1; }
    button.setAttribute("aria-current", "true");
    button.tabIndex = 0;
    const numbers = quantities.filter((q) => tokens[q.name]).map((q) => `${q.title} ${format(tokens[q.name][index])}`);
    by("token-numbers").textContent = [`token ${index + 1} of ${buttons.length}, “${tokens.text[index]}”`, ...numbers].join("; ");
  }

  function table() {
    const target = by("token-all").querySelector("table"), { tokens } = sample();
    target.replaceChildren();
    if (!by("token-all").open || !tokens.text) return;
    const shown = quantities.filter((q) => tokens[q.name]), head = made("tr", "", made("thead", "", target));
    for (const name of ["token", ...shown.map((q) => q.title)]) made("th", name, head).scope = "col";
    const body = made("tbody", "", target);
    tokens.text.forEach((text, index) => {
      const line = made("tr", "", body);
      made("bdi", text, made("th", "", line)).className = "text";
      for (const q of shown) made("td", format(tokens[q.name][index]), line);
    });
  }

  function show() {
    const { prompt, response, tokens } = sample(), place = by("token-text");
    by("token-prompt").textContent = prompt;
    by("token-numbers").textContent = tokens.text ? "no token chosen" : "the run kept no numbers of these tokens";
    place.replaceChildren();
    if (!tokens.text) { made("bdi", response, place).className = "text"; return; }
    tokens.text.forEach((text, index) => {
      const button = made("button", text.replaceAll("\n", "⏎\n"), place);
      button.type = "button";
      button.className = tokens.clipped && tokens.clipped[index] ? "token clipped" : "token";
      button.tabIndex = index ? -1 : 0;
    });
    color();
    table();
  }

  function rows() {
    pick.row.replaceChildren();
    tables[pick.table.selectedIndex].rows.forEach((row, index) => {
      made("option", `${index + 1}: score ${format(row.score)}${row.finished ? "" : ", cut off"}`, pick.row);
    });
    show();
  }

  for (const t of tables) made("option", String(t.iteration), pick.table);
  for (const q of quantities) made("option", q.title, pick.quantity).value = q.name;
  pick.table.selectedIndex = tables.length - 1;
  pick.table.addEventListener("change", () => { const row = pick.row.selectedIndex; rows(); pick.row.selectedIndex = Math.min(row, pick.row.length - 1); show(); });
  pick.row.addEventListener("change", show);
  pick.quantity.addEventListener("change", color);
  by("token-all").addEventListener("toggle", table);
  by("token-text").addEventListener("keydown", (event) => {
    const buttons = [...by("token-text").children], index = buttons.indexOf(document.activeElement);
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || !buttons[to]) return;
    event.preventDefault();
    buttons[to].focus();
  });
  for (const kind of ["focusin", "pointerover", "click"]) {
    by("token-text").addEventListener(kind, (event) => { if (event.target.classList.contains("token")) choose(event.target); });
  }
  rows();
})();
