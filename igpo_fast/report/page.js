"use strict";
// Texts of a run become text nodes only (textContent), never markup.

const ROW = 48; // height of a row of the list, in CSS pixels
const SPARE = 8; // rows drawn above and below the visible ones
const RANGES = { f1: (r) => r.f1, outcome: (r) => r.outcome, gain: (r) => largest(r.gains) };
const at = (id) => document.getElementById(id);
const parsed = (id) => JSON.parse(at(id).textContent);

let index = parsed("index");
let byKey = new Map();
let found = []; // what the filters let through, in order
let open = ""; // key of the open rollout
let failure = ""; // the chosen kind
const groups = new Map(); // key of a group's first rollout -> its turns in full, once they were read

function largest(numbers) {
  const known = (numbers ?? []).filter((x) => x !== null);
  return known.length ? Math.max(...known) : null;
}

function make(tag, text, classes, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (classes) element.className = classes;
  element.append(...children.filter((child) => child));
  return element;
}

// A text of the run, which may be written from the right.
function own(tag, text, classes) {
  return Object.assign(make(tag, text, classes), { dir: "auto" });
}

const named = (action) => (action === "invalid" ? "malformed" : action); // as the failure is called
const known = (x) => x !== null && x !== undefined;
const number = (x) => (known(x) ? x.toFixed(3) : "–");
const zero = (x) => Math.abs(x) < 0.0005; // shown as 0.000
const signed = (x) => (!known(x) ? "–" : zero(x) ? "0.000" : (x > 0 ? "+" : "") + x.toFixed(3));
const tone = (x) => (zero(x) ? "" : x > 0 ? "good" : "bad");

function probability(value) {
  return known(value) ? (index.basis === "log_prob" ? Math.exp(value) : value) : null;
}

function chance(p) {
  return known(p) && p > 0 && p < 0.0005 ? p.toExponential(0) : number(p);
}

// ---- filters

function texts(r) {
  r.texts ??= [r.question, r.id, r.answer ?? "", ...r.answers, ...r.turns.map((turn) => turn[1])].join("\n").toLowerCase();
  return r.texts;
}

function passes() {
  const value = (id) => at(id).value;
  const [text, kind, step, dataset] = [value("text").toLowerCase(), value("kind"), value("step"), value("dataset")];
  const ranges = Object.entries(RANGES)
    .map(([id, of]) => [of, parseFloat(value(`${id}-from`)), parseFloat(value(`${id}-to`))])
    .filter(([, from, to]) => !isNaN(from) || !isNaN(to));
  return (r) =>
    (!kind || r.kind === kind) &&
    (!step || r.step === +step) &&
    (!dataset || r.dataset === dataset) &&
    ranges.every(([of, from, to]) => known(of(r)) && !(of(r) < from) && !(of(r) > to)) &&
    (!text || texts(r).includes(text));
}

function filter() {
  const matching = index.rollouts.filter(passes());
  found = failure ? matching.filter((r) => r.failures.includes(failure)) : matching;
  at("failures").replaceChildren(
    ...Object.entries(index.failures).map(([kind, meaning]) => {
      const count = matching.filter((r) => r.failures.includes(kind)).length;
      const button = make("button", `${kind} ${count}`);
      button.type = "button";
      button.title = meaning;
      button.disabled = !count && kind !== failure;
      button.setAttribute("aria-pressed", kind === failure);
      button.onclick = () => {
        failure = kind === failure ? "" : kind;
        filter();
      };
      return button;
    }),
  );
  at("count").textContent = `${found.length} of ${index.rollouts.length} rollouts`;
  at("rows").style.height = `${found.length * ROW}px`;
  drawRows();
}

function options(id, values, name) {
  const chosen = at(id).value;
  const option = (value, text) => Object.assign(make("option", text), { value });
  at(id).replaceChildren(option("", "all"), ...values.map((value) => option(value, name(value))));
  at(id).value = values.map(String).includes(chosen) ? chosen : "";
}

// ---- the list

function drawRows() {
  const list = at("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE;
  at("rows").replaceChildren(...found.slice(first, last).map((r, i) => row(r, first + i)));
}

function row(r, place) {
  const link = make("a");
  link.href = `#${r.key}`;
  link.style.top = `${place * ROW}px`;
  if (r.key === open) link.setAttribute("aria-current", "true");
  const scores = [
    `${r.kind === "eval" ? "eval " : ""}step ${r.step}`,
    r.kind === "train" && `#${r.index}`,
    known(r.f1) ? `F1 ${r.f1.toFixed(2)}` : known(r.outcome) && `outcome ${r.outcome.toFixed(2)}`,
    `${r.turns.length} turn${r.turns.length > 1 ? "s" : ""}`,
    known(largest(r.gains)) && `gain ${signed(largest(r.gains))}`,
    ...r.failures,
  ];
  link.append(own("div", r.question), make("div", scores.filter((part) => part).join(" · "), "quiet"));
  return link;
}

function reveal(key) {
  const place = found.findIndex((r) => r.key === key);
  const list = at("list");
  if (place >= 0 && (place * ROW < list.scrollTop || (place + 1) * ROW > list.scrollTop + list.clientHeight))
    list.scrollTop = (place + 0.5) * ROW - list.clientHeight / 2;
}

function move(by) {
  const place = found.findIndex((r) => r.key === open);
  const next = found[place < 0 ? 0 : Math.min(Math.max(place + by, 0), found.length - 1)];
  if (next) show(next.key);
}

// ---- one rollout

function show(key) {
  const r = byKey.get(key);
  if (!r) return false;
  open = key;
  history.replaceState(null, "", `#${key}`);
  reveal(key);
  drawRows();
  const full = detail(r);
  const members = index.rollouts.filter((other) => other.group === r.group);
  const most = Math.max(...members.flatMap((one) => one.advantages ?? []).map((a) => Math.abs(a ?? 0)), 1e-9);
  at("rollout").replaceChildren(
    own("h2", r.question),
    facts(r),
    members.length > 1 ? sideBySide(members, r) : "",
    ...r.turns.map((_, t) => turnOf(r, full.rollouts[key], t, most)),
    full.prompt === null ? "" : folded("prompt", full.prompt),
  );
  const column = document.querySelector("#rollout th[aria-current]");
  if (column) column.closest(".scroll").scrollLeft = column.offsetLeft - 80;
  return true;
}

function detail(r) {
  if (!groups.has(r.group)) groups.set(r.group, parsed(`group-${r.group}`));
  return groups.get(r.group);
}

function fact(label, text, classes) {
  return make("span", `${label} `, "", own("b", text, classes));
}

function facts(r) {
  const box = make("div", null, "facts");
  box.append(
    fact("accepted", r.answers.join(" | ") || "–"),
    ...(r.truth ? [fact("ground truth", r.truth.join(" | ") || "–")] : []),
    fact("answer", r.answer ?? "none", r.answer === null ? "bad" : ""),
    fact("F1", number(r.f1)),
    fact("EM", number(r.em)),
    ...(known(r.outcome) ? [fact("outcome", number(r.outcome))] : []),
    ...Object.entries(r.rewards).map(([name, x]) => fact(name, number(x))),
    fact("tokens", r.tokens),
    fact(r.kind === "eval" ? "evaluation after step" : "step", r.step),
    ...(r.dataset ? [fact("data set", r.dataset)] : []),
    fact("id", r.id),
    fact("record", r.key.replace(".", ".jsonl:")),
    ...r.failures.map((kind) => make("b", index.failures[kind], "bad")),
  );
  return box;
}

function sideBySide(members, current) {
  const table = make("table");
  const head = make("tr", null, "", make("th", ""));
  for (const r of members) {
    const link = make("a", `#${r.index}`);
    link.href = `#${r.key}`;
    const scores = [known(r.f1) && `F1 ${number(r.f1)}`, known(r.outcome) && `outcome ${number(r.outcome)}`];
    const cell = make("th", null, "", link, make("div", scores.filter((part) => part).join(", "), "quiet"));
    if (r === current) cell.setAttribute("aria-current", "true");
    head.append(cell);
  }
  table.append(head);
  const turns = Math.max(...members.map((r) => r.turns.length));
  for (let t = 0; t < turns; t++) {
    const line = make("tr", null, "", make("th", t + 1));
    for (const r of members) {
      const cell = make("td");
      if (r === current) cell.className = "current";
      if (t < r.turns.length) {
        const [action, argument] = r.turns[t];
        cell.append(own("div", [named(action), argument].filter((part) => part).join(": "), "did"), credit(r, t));
      }
      line.append(cell);
    }
    table.append(line);
  }
  const last = make("tr", null, "", make("th", "answer"), ...members.map((r) => own("td", r.answer ?? "none", r.answer === null ? "bad" : "")));
  table.append(last);
  return make("div", null, "scroll", table);
}

function credit(r, t) {
  const line = make("div", null, "facts quiet");
  const [gain, advantage] = [r.gains?.[t], r.advantages?.[t]];
  if (known(gain)) line.append(fact("gain", signed(gain), tone(gain)));
  if (known(advantage)) line.append(fact("A", signed(advantage), tone(advantage)));
  return line;
}

function turnOf(r, turns, t, most) {
  const turn = turns[t];
  const box = make("section", null, "turn");
  const head = make("div", null, "facts", make("b", `${t + 1}. ${named(r.turns[t][0])}`));
  const [before, after] = [probability(r.values?.[t]), probability(r.values?.[t + 1])];
  if (known(before)) {
    const of = index.baseline === "masked" ? "next turn" : "answer";
    head.append(make("span", `p(${of}) ${chance(before)}${known(after) ? ` → ${chance(after)}` : ""} `, "", bar(known(after) ? after : before)));
  }
  if (known(r.baselines?.[t])) head.append(fact("compared with", chance(probability(r.baselines[t]))));
  if (known(r.gains?.[t])) head.append(fact("gain", signed(r.gains[t]), tone(r.gains[t])));
  if (known(r.advantages?.[t])) head.append(fact("advantage", signed(r.advantages[t]), tone(r.advantages[t])));
  if (turn.failed) head.append(make("b", "a call failed", "bad"));
  const said = make("pre");
  said.dir = "auto";
  const advantage = r.advantages?.[t] ?? 0;
  const share = Math.round((45 * Math.abs(advantage)) / most);
  const colour = `color-mix(in srgb, var(${advantage > 0 ? "--good" : "--bad"}) ${share}%, transparent)`;
  turn.said.forEach((text, i) => {
    const token = make("span", text);
    token.style.backgroundColor = colour;
    if (turn.logp) token.title = `log-prob ${turn.logp[i]}`;
    said.append(token);
  });
  box.append(head, said);
  if (turn.response) {
    const response = marked(turn.response, turn.marks);
    response.dir = "auto";
    box.append(make("div", null, "response", make("span", origin(turn, r.turns[t][0]), "quiet"), response));
  }
  return box;
}

function origin(turn, action) {
  if (action === "invalid") return "no call and no answer were read in this turn; told in return";
  if (turn.passages.length) return `passages ${turn.passages.join(", ")}`;
  return turn.found ? "result" : "nothing found";
}

function bar(p) {
  const inner = make("i");
  inner.style.width = `${100 * Math.min(p, 1)}%`;
  return make("span", null, "chance", inner);
}

function folded(title, text) {
  return make("details", null, "", make("summary", title), make("pre", text));
}

// The text with some ranges of its characters (code points) marked.
function marked(text, ranges) {
  const box = make("pre");
  const characters = ranges.length ? [...text] : [];
  let from = 0;
  for (const [start, end] of ranges) {
    box.append(characters.slice(from, start).join(""), make("mark", characters.slice(start, end).join("")));
    from = end;
  }
  box.append(ranges.length ? characters.slice(from).join("") : text);
  return box;
}

// ---- reading the page's data, at first and when a run has gone on

function read() {
  byKey = new Map(index.rollouts.map((r) => [r.key, r]));
  const distinct = (of) => [...new Set(index.rollouts.map(of))];
  options("step", distinct((r) => r.step).sort((a, b) => a - b), (step) => step);
  options("dataset", distinct((r) => r.dataset).filter((name) => name).sort(), (name) => name);
  at("datasets").hidden = at("dataset").options.length < 2;
  filter();
}

function renew(page) {
  const list = at("list");
  const top = found[Math.floor(list.scrollTop / ROW)]?.key;
  const kept = byKey.get(open);
  const own = kept ? index.rollouts.filter((r) => r.group === kept.group) : [];
  if (kept) detail(kept); // read while its element is there
  for (const key of groups.keys()) if (key !== kept?.group) groups.delete(key);
  for (const details of document.querySelectorAll("#curves details"))
    page.getElementById(details.id)?.toggleAttribute("open", details.open);
  for (const id of ["about", "curves", "told", "data"]) at(id).replaceWith(document.adoptNode(page.getElementById(id)));
  index = parsed("index");
  // The open rollout's group stays, even where the new page leaves it out.
  const fresh = new Set(index.rollouts.map((r) => r.key));
  index.rollouts.push(...own.filter((r) => !fresh.has(r.key)));
  read();
  const place = found.findIndex((r) => r.key === top);
  if (place >= 0) list.scrollTop = place * ROW + (list.scrollTop % ROW);
  drawRows();
}

async function follow() {
  let said = "following the run";
  try {
    const version = await fetch("version");
    if (!version.ok) throw new Error(await version.text());
    if ((await version.text()) !== document.body.dataset.version) {
      const answer = await fetch("/");
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      const page = new DOMParser().parseFromString(text, "text/html");
      renew(page);
      document.body.dataset.version = page.body.dataset.version;
    }
  } catch (error) {
    said = `not following: ${error.message}`;
  }
  at("live").textContent = said;
  setTimeout(follow, 2000);
}

// ---- events

at("list").addEventListener("scroll", drawRows, { passive: true });
addEventListener("resize", drawRows);
at("filters").addEventListener("input", filter);
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("filters").addEventListener("reset", () => {
  failure = "";
  setTimeout(filter); // once the fields are empty
});
addEventListener("hashchange", () => {
  if (!show(location.hash.slice(1)) && open) history.replaceState(null, "", `#${open}`);
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select");
  if (typing && event.key === "Escape") event.target.blur();
  if (typing) return;
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "/") {
    event.preventDefault();
    at("text").focus();
  }
});

read();
if (show(location.hash.slice(1))) at("rollouts").scrollIntoView();
if (document.body.dataset.version) follow();
