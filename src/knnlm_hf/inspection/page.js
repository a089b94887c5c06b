"use strict";
// Tokens are walked like the options of a list; what a token's neighbours say goes into the panel.
// Everything that comes from a text is put in with textContent: nothing of it is ever HTML.
(() => {
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);
  const text = find("text"), panel = find("panel"), details = find("details");
  const tokens = [...text.children];
  const beside = matchMedia("(min-width: 64rem)"); // elsewhere the panel would open over the pointer
  const phrases = {};
  for (const one of document.querySelectorAll(".legend .t")) phrases[level(one)] = one.textContent;
  let selected = null; // the token that was chosen; where there is none, the pointer shows them
  let stop = 0; // the token that the Tab key comes to

  function level(token) { return token.className.split(" ")[1]; }

  function make(tag, options, ...children) {
    const made = Object.assign(document.createElement(tag), options);
    made.append(...children);
    return made;
  }

  function shown(words) {
    const visible = words.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥");
    return visible === "" ? "part of a character" : visible.trim() || "␣".repeat(visible.length);
  }

  function name(token) {
    const words = token.textContent;
    if (words.trim()) return words.trim();
    return words === "" ? "part of a character" : words.includes("\n") ? "line break" : "space";
  }

  function bar(percent) {
    const made = make("span", { className: "bar" });
    made.style.width = Math.max(0, Math.min(100, parseFloat(percent) || 0)) + "%";
    return made;
  }

  function row(label, percent) {
    const head = make("th", { scope: "row" }, label);
    return make("tr", {}, head, make("td", {}, percent), make("td", {}, bar(percent)));
  }

  function source(memory, document_) {
    const place = document_ === null ? "this text" : `document ${document_}`;
    return (data.memories > 1 ? `memory ${memory + 1}, ` : "") + place;
  }

  function neighbour([place, weight, rank], id) {
    const [memory, document_, token, parts] = data.contexts[place];
    const head = make("span", {}, `${rank}. ${weight} – ${source(memory, document_)} `);
    if (token === id) head.append(make("span", { className: "badge" }, "carries this token"));
    const quote = parts
      ? make("span", { className: "quote", dir: "auto" }, parts[0], make("b", {}, parts[1] || "⋯"), parts[2])
      : make("span", { className: "quote" }, "its text is not in this datastore");
    return make("li", { className: token === id ? "carries" : "" }, head, bar(weight), quote);
  }

  function fill(i) {
    const facts = data.tokens[i];
    find("panel-title").textContent = `“${shown(tokens[i].textContent)}”`;
    const place = make("p", { className: "quiet" }, `token ${i + 1} of ${tokens.length}: ${phrases[level(tokens[i])]}`);
    details.replaceChildren(place);
    if (!facts) return;
    const [model, memory, mixture] = facts.p;
    const rows = [row("model", model), row("memory", memory)];
    (facts.e || []).forEach((each, n) => rows.push(row(`memory ${n + 1}`, each)));
    details.append(
      make("table", { className: "said" }, make("tbody", {}, ...rows, row("mixture", mixture))),
      make("p", {}, `${facts.x} Likeliest here, by the mixture: “${shown(facts.g[0])}”, ${facts.g[1]}.`),
      make("h3", {}, "Neighbours"),
      make("ol", { className: "neighbours" }, ...facts.n.map((one) => neighbour(one, facts.id))),
      make("p", { className: "quiet" }, facts.n.length ? data.note : "The memory found none."),
    );
  }

  function show(i) {
    fill(i);
    panel.hidden = false;
    panel.scrollTop = 0;
    document.body.classList.add("open");
  }

  function close() {
    if (selected !== null) tokens[selected].setAttribute("aria-selected", "false");
    selected = null;
    panel.hidden = true;
    find("status").textContent = "";
    document.body.classList.remove("open");
  }

  function select(i) {
    if (selected !== null) tokens[selected].setAttribute("aria-selected", "false");
    tokens[stop].tabIndex = -1;
    tokens[i].tabIndex = 0;
    tokens[i].setAttribute("aria-selected", "true");
    selected = stop = i;
    show(i);
    tokens[i].scrollIntoView({ block: "nearest" }); // from under the panel, on a small screen
    const facts = data.tokens[i];
    find("status").textContent = facts
      ? `model ${facts.p[0]}, memory ${facts.p[1]}, mixture ${facts.p[2]}; ${facts.n.length} neighbours`
      : "";
  }

  function onOtherLine(i, step) {
    const place = (token) => token.getClientRects()[0] || token.getBoundingClientRect();
    const from = place(tokens[i]);
    let best = i, line = null;
    for (let n = i + step; n >= 0 && n < tokens.length; n += step) {
      const here = place(tokens[n]);
      if (Math.abs(here.top - from.top) < from.height / 2) continue;
      if (line !== null && Math.abs(here.top - line) > from.height / 2) break;
      line = here.top;
      const distance = (rect) => Math.abs(rect.left - from.left);
      if (best === i || distance(here) < distance(place(tokens[best]))) best = n;
    }
    return best;
  }

  function target(key, i) {
    switch (key) {
      case "ArrowRight": return Math.min(tokens.length - 1, i + 1);
      case "ArrowLeft": return Math.max(0, i - 1);
      case "ArrowDown": return onOtherLine(i, 1);
      case "ArrowUp": return onOtherLine(i, -1);
      case "Home": return 0;
      case "End": return tokens.length - 1;
      case "Enter": case " ": return i;
      default: return null;
    }
  }

  text.setAttribute("role", "listbox");
  text.setAttribute("aria-labelledby", "text-title");
  text.setAttribute("aria-describedby", "hint");
  text.setAttribute("aria-orientation", "horizontal");
  tokens.forEach((token, i) => {
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    token.setAttribute("aria-label", `${name(token)}: ${phrases[level(token)]}`);
    token.tabIndex = i === 0 ? 0 : -1;
  });
  find("hint").hidden = false;

  text.addEventListener("focusin", (event) => select(tokens.indexOf(event.target)));
  text.addEventListener("click", (event) => {
    const i = tokens.indexOf(event.target);
    if (i >= 0 && selected !== i) select(i); // it had the focus already
  });
  text.addEventListener("pointerover", (event) => {
    const i = tokens.indexOf(event.target);
    if (i >= 0 && selected === null && event.pointerType === "mouse" && beside.matches) show(i);
  });
  text.addEventListener("keydown", (event) => {
    const i = tokens.indexOf(event.target);
    if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const next = target(event.key, i);
    if (next === null) return;
    event.preventDefault();
    tokens[next].focus({ preventScroll: true });
    if (selected !== next) select(next);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || panel.hidden) return;
    const back = panel.contains(document.activeElement) ? selected : null;
    close();
    if (back !== null) { tokens[back].focus({ preventScroll: true }); close(); }
  });
  find("close").addEventListener("click", () => {
    const back = selected;
    close();
    if (back !== null) { tokens[back].focus({ preventScroll: true }); close(); }
  });
})();
