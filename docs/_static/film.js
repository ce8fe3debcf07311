// The film on the home page: two runs of the weights that ship, side by side. docs/film.py recorded them.
"use strict";
addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("film");
  const SIDE = 64; // pixels of a picture on a sheet
  const SHOWN = ["z_t, its first three channels as colours", "z_t, decoded", "the picture that the network predicts"];
  const folder = root.dataset.folder;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const last = FILM.times.length - 1;
  const choice = { step: last, seed: 0, runs: [{ prompt: 0, scale: 3 }, { prompt: 1, scale: 3 }] };
  const sheets = {}; // name -> Image, loaded when it is first wanted

  function element(tag, settings = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(settings)) {
      if (typeof value === "string") node.setAttribute(name, value);
      else node[name] = value;
    }
    node.append(...children);
    return node;
  }

  function list(text, name, options, chosen, onchange) {
    const all = options.map(([value, shown]) => element("option", { value: `${value}`, selected: value === chosen }, shown));
    const select = element("select", { name, onchange: () => (onchange(Number(select.value)), show()) }, ...all);
    return element("label", {}, element("span", {}, text), select);
  }

  function sheet(run) {
    const name = `${run.prompt}-${run.scale}-${choice.seed}`;
    sheets[name] ??= element("img", { src: `${folder}${name}.webp`, onload: show });
    return sheets[name];
  }

  const panes = choice.runs.map((run, k) => {
    const canvases = SHOWN.map((text) => element("canvas", { width: SIDE, height: SIDE, role: "img", "aria-label": text }));
    const figures = canvases.map((canvas, row) => element("figure", {}, canvas, element("figcaption", {}, SHOWN[row])));
    const side = "AB"[k];
    const prompts = list(`Prompt ${side}`, `film-prompt-${side}`, FILM.prompts.map((p, i) => [i, p]), run.prompt, (i) => (run.prompt = i));
    const scales = list(`Guidance ${side}`, `film-scale-${side}`, FILM.scales.map((s) => [s, `${s}`]), run.scale, (s) => (run.scale = s));
    root.append(element("div", { class: "film-pane" }, prompts, scales, element("div", { class: "film-row" }, ...figures)));
    return { run, canvases };
  });

  const range = element("input", { type: "range", name: "film-step", min: "0", max: `${last}`, "aria-label": "Time" });
  const output = element("output");
  const play = element("button", { type: "button" });
  const seeds = list("Noise", "film-seed", FILM.seeds.map((s) => [s, `seed ${s}`]), 0, (s) => (choice.seed = s));
  range.oninput = () => (stop(), (choice.step = Number(range.value)), show());
  root.append(element("div", { class: "film-time" }, play, range, output, seeds));

  // Play: never by itself, and without motion where the reader wants none
  let timer = 0;
  const stop = () => (timer = clearInterval(timer) ?? 0);
  play.onclick = () => {
    if (timer) stop();
    else if (calm.matches) choice.step = choice.step === last ? 0 : last;
    else {
      if (choice.step === last) choice.step = 0;
      timer = setInterval(() => {
        choice.step += 1;
        if (choice.step === last) stop();
        show();
      }, 200);
    }
    show();
  };

  function show() {
    const t = FILM.times[choice.step];
    range.value = choice.step;
    output.textContent = range.ariaValueText = t < 0 ? "the result" : `t = ${t}`;
    play.textContent = calm.matches ? (choice.step === last ? "To the start" : "To the end") : timer ? "Pause" : "Play";
    for (const { run, canvases } of panes) {
      const from = sheet(run);
      if (!from.complete || !from.naturalWidth) continue; // its onload shows it
      canvases.forEach((canvas, row) => {
        canvas.getContext("2d").drawImage(from, choice.step * SIDE, row * SIDE, SIDE, SIDE, 0, 0, SIDE, SIDE);
      });
    }
    root.dataset.shown = `${choice.step}`;
  }

  calm.addEventListener("change", show);
  root.classList.add("film-live");
  show();
});
