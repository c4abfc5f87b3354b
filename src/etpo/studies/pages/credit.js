"use strict";

// fraction of tokens within the scale; the others have the full colour
const WITHIN = 0.98;
const COLOURS = { advantage: "advantage", log_ratio: "log π/π_ref" };
const NUMBERS = {
  advantage: "advantage",
  critic_advantage: "– from the critic",
  sampled_advantage: "– from the return",
  q: "Q",
  value: "V",
  log_ratio: "log π/π_ref",
  entropy: "entropy",
  kl: "KL(π ‖ π_ref)",
};

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");
const tip = document.getElementById("tip");
const slider = document.getElementById("iteration");
const shownIteration = document.querySelector("output");
const colour = document.getElementById("colour");
const scaleOf = document.getElementById("scale");

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function signed(x) {
  return (x < 0 ? "−" : "+") + number(Math.abs(x));
}

function number(x) {
  const size = Math.abs(x);
  const text = size !== 0 && size < 0.001 ? size.toExponential(1) : size.toFixed(3);
  return (x < 0 ? "−" : "") + text.replace("e-", "e−");
}

// Absolute value with the full colour; the scale is symmetric around 0.
function scale(key) {
  const iterations = scaleOf.value === "all" ? data : [data[slider.value]];
  const sizes = iterations
    .flatMap((iteration) => iteration.actions.flatMap((action) => action[key] ?? []))
    .filter((x) => x !== null)
    .map(Math.abs)
    .sort((a, b) => a - b);
  return sizes[Math.ceil(WITHIN * sizes.length) - 1] || 1;
}

function paint(token, x, full) {
  token.classList.remove("plus", "minus");
  if (x === null || x === undefined || x === 0) return;
  token.classList.add(x > 0 ? "plus" : "minus");
  token.style.setProperty("--strength", `${Math.round(100 * Math.min(1, Math.abs(x) / full))}%`);
}

// Mark spaces, line ends and tabs; copied text stays unchanged.
function visible(text) {
  const parts = document.createDocumentFragment();
  for (const piece of text.split(/([ \n\t])/)) {
    const kind = { " ": "space", "\n": "newline", "\t": "tab" }[piece];
    parts.append(kind ? element("span", kind, piece) : piece);
  }
  return parts;
}

function tokens(action) {
  const code = element("pre", "tokens");
  action.text.forEach((text, place) => {
    const token = element("span", "token");
    token.tabIndex = place === 0 ? 0 : -1;
    if (text === "") token.append(element("span", "name", action.names[place]));
    else token.append(visible(text));
    token.action = action;
    token.place = place;
    code.append(token);
  });
  return code;
}

function card(action) {
  const box = element("article", "action");
  const head = box.appendChild(element("div", "head"));
  head.append(
    element("b", "", `attempt ${action.attempt}`),
    element("span", "", `reward ${number(action.reward)}`),
    element("span", "", action.error === null ? "no error" : "failed"),
  );
  box.append(tokens(action));
  if (action.error !== null) box.append(element("p", "error", action.error));
  const prompt = box.appendChild(element("details"));
  prompt.append(element("summary", "", "prompt"), element("pre", "", action.prompt));
  return box;
}

function section(title, note) {
  const part = main.appendChild(element("section"));
  part.append(element("h2", "", title));
  if (note) part.append(element("p", "faint", note));
  return part;
}

function summary(actions) {
  const mean = actions.reduce((sum, action) => sum + action.reward, 0) / actions.length;
  const failed = actions.filter((action) => action.error !== null).length;
  return `${actions.length} actions, mean reward ${number(mean)}, ${failed} failed`;
}

function show() {
  const { iteration, actions } = data[slider.value];
  hide();
  main.replaceChildren();
  shownIteration.textContent = `${iteration} of ${data.at(-1).iteration}`;
  slider.setAttribute("aria-valuetext", `iteration ${iteration}`);
  for (const action of actions.filter((action) => "followed" in action)) {
    section(
      "Followed action",
      `Sampled in iteration ${action.followed}, evaluated by this iteration's policy and critic.`,
    ).append(card(action));
  }
  const sampled = actions.filter((action) => !("followed" in action));
  let part, episode;
  sampled.forEach((action, place) => {
    const name = `Environment ${action.env}, episode ${action.episode}`;
    if (name !== episode) part = section(name, place === 0 ? `Sampled in this iteration: ${summary(sampled)}.` : "");
    episode = name;
    part.append(card(action));
  });
  repaint();
}

function repaint() {
  const full = scale(colour.value);
  for (const token of main.querySelectorAll(".token")) {
    paint(token, token.action[colour.value]?.[token.place], full);
  }
  document.querySelector(".least").textContent = number(-full);
  document.querySelector(".most").textContent = signed(full);
  document
    .querySelector(".bar")
    .setAttribute("aria-label", `${COLOURS[colour.value]} from ${number(-full)} to ${signed(full)}`);
}

function row(cells, name = "td") {
  const line = element("tr");
  cells.forEach((cell, place) => {
    const node = line.appendChild(element(place === 0 && name === "th" ? "th" : name));
    node.append(cell);
  });
  return line;
}

function codeOf(text) {
  return element("code", "", JSON.stringify(text).slice(1, -1).replaceAll(" ", "·").replaceAll('\\"', '"'));
}

function numbers(action, place) {
  const table = element("table");
  for (const [key, name] of Object.entries(NUMBERS)) {
    const x = action[key]?.[place];
    if (x === null || x === undefined) continue;
    const isSigned = key.includes("advantage") || key === "log_ratio";
    table.append(row([name, isSigned ? signed(x) : number(x)]));
  }
  return table;
}

function choices(action, place) {
  const table = element("table");
  const withQ = action.q !== undefined;
  table.append(row(["token", "π", ...(withQ ? ["Q"] : [])], "th"));
  const own = [action.text[place] || action.names[place], action.probability[place]];
  if (withQ) own.push(action.q[place]);
  [own, ...action.alternatives[place]].forEach(([text, ...cells], index) => {
    const line = table.appendChild(row([codeOf(text), ...cells.map(number)]));
    if (index === 0) line.className = "sign";
  });
  return table;
}

function explain(token) {
  tip.replaceChildren(numbers(token.action, token.place), choices(token.action, token.place));
  tip.hidden = false;
  token.setAttribute("aria-describedby", "tip");
  placeTip(token);
}

function placeTip(token) {
  const box = token.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + 6;
  const fits = below + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${fits ? below : Math.max(8, box.top - tip.offsetHeight - 6)}px`;
}

function explainedToken() {
  return main.querySelector("[aria-describedby]");
}

function hide() {
  tip.hidden = true;
  explainedToken()?.removeAttribute("aria-describedby");
}

// The URL fragment selects the iteration.
function readFragment() {
  const named = new URLSearchParams(location.hash.slice(1)).get("iteration");
  const place = data.findIndex(({ iteration }) => String(iteration) === named);
  slider.value = Math.max(place, 0);
  show();
}

function writeFragment() {
  try {
    history.replaceState(null, "", `#iteration=${data[slider.value].iteration}`);
  } catch (refused) {
    // a page in a frame may not change its URL
    if (refused.name !== "SecurityError") throw refused;
  }
}

const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };

function walk(event) {
  if (event.key === "Escape") return hide();
  const token = event.target.closest(".token");
  if (!token || !(event.key in STEPS)) return;
  event.preventDefault();
  const all = [...token.parentNode.children];
  const place = Math.min(Math.max(token.place + STEPS[event.key], 0), all.length - 1);
  token.tabIndex = -1;
  all[place].tabIndex = 0;
  all[place].focus();
}

for (const [key, name] of Object.entries(COLOURS)) {
  const known = data.some(({ actions }) => actions.some((action) => key in action));
  if (known) colour.append(new Option(name, key));
}
slider.max = data.length - 1;
slider.addEventListener("input", () => { show(); writeFragment(); });
colour.addEventListener("change", repaint);
scaleOf.addEventListener("change", repaint);
window.addEventListener("hashchange", readFragment);
window.addEventListener("scroll", () => { if (explainedToken()) placeTip(explainedToken()); }, { passive: true });
document.addEventListener("keydown", walk);
for (const event of ["mouseover", "focusin"]) {
  main.addEventListener(event, ({ target }) => {
    const token = target.closest(".token");
    if (token) { hide(); explain(token); }
  });
}
for (const event of ["mouseout", "focusout"]) main.addEventListener(event, hide);
readFragment();
