// The page docs/explore.md: draws what plane.js computes, and lets mouse, finger and keyboard move it.
"use strict";
addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("plane");
  const N = 500; // samples
  const STEPS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 150, 200];
  const CURVE = [1, 2, 3, 5, 8, 12, 20, 35, 60, 100, 200];
  const REACH = 3; // the planes show -3..3 in x and in y
  const MOST = 240; // points that a reader may draw
  const NAMES = { ddpm: "DDPM", ddim: "DDIM", "dpm++": "DPM-Solver++ 2M" };
  const SHORT = { ...NAMES, "dpm++": "DPM++ 2M" };
  const SCHEDULES = { linear: "linear", scaled_linear: "scaled-linear", cosine: "cosine" };
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  const choice = {
    preset: "two moons", tool: "move", schedule: "linear", sampler: "ddim", steps: 20, eta: 0, prediction: "eps", error: 0,
    guide: "both", scale: 1, paths: "many", density: true, score: true, t: 99, seed: 1,
  };
  let points = [];
  let classes = [];
  let data = null; // the mixture
  let schedule = Plane.schedule(choice.schedule);
  let cloud = null; // clean points, their classes and their noise
  let start = [0.3, 2.3]; // of the paths that share one
  let run = null; // {states, paths, distance, floor, ms}
  let curves = {};
  let cursor = null; // the keyboard's place in the left plane
  let held = -1; // the point that moves

  // --- The page's elements
  function element(tag, settings = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(settings)) {
      if (typeof value === "string") node.setAttribute(name, value);
      else node[name] = value;
    }
    node.append(...children);
    return node;
  }
  const box = (name, ...children) => element("div", { class: `plane-${name}` }, ...children);
  const span = (text) => element("span", {}, text);
  const label = (kind, ...children) => element("label", { class: `plane-${kind}` }, ...children);
  const button = (text, onclick) => element("button", { type: "button", class: "plane-button", onclick }, text);
  const controls = {}; // name -> function that shows the choice

  function pills(name, legend, options) {
    const all = Object.entries(options).map(([value, text]) => {
      const input = element("input", { type: "radio", name: `plane-${name}`, value, onchange: () => set({ [name]: value }) });
      return label("pill", input, span(text));
    });
    controls[name] = () => all.forEach(({ firstChild }) => (firstChild.checked = firstChild.value === choice[name]));
    return element("fieldset", { class: "plane-pills" }, element("legend", {}, legend), ...all);
  }

  function list(name, text, options) {
    const all = Object.entries(options).map(([value, shown]) => element("option", { value }, shown));
    const select = element("select", { name: `plane-${name}`, onchange: () => set({ [name]: select.value }) }, ...all);
    controls[name] = () => (select.value = choice[name]);
    return label("line", span(text), select);
  }

  function slider(name, text, [min, max, step], show, values) {
    const input = element("input", { type: "range", name: `plane-${name}`, min: `${min}`, max: `${max}`, step: `${step}` });
    const output = element("output");
    input.oninput = () => set({ [name]: values ? values[input.value] : Number(input.value) });
    controls[name] = () => {
      input.value = values ? values.indexOf(choice[name]) : choice[name];
      input.ariaValueText = output.textContent = show(choice[name]);
    };
    return label("slider", span(text), output, input);
  }

  function tick(name) {
    const input = element("input", { type: "checkbox", name: `plane-${name}`, onchange: () => set({ [name]: input.checked }) });
    controls[name] = () => (input.checked = choice[name]);
    return label("tick", input, name);
  }

  function picture(id, title, settings) {
    const canvas = element("canvas", { id: `plane-${id}`, ...settings });
    const readout = element("span", { id: `plane-${id}-readout` });
    return [canvas, readout, element("figure", {}, element("figcaption", {}, element("strong", {}, title), " ", readout), canvas)];
  }

  const hands = { tabIndex: 0, role: "application" };
  const [left, left_note, left_figure] = picture("forward", "Forward", hands);
  const [right, right_note, right_figure] = picture("reverse", "Reverse", {
    ...hands, "aria-label": "Samples and their paths. Arrow keys move the common start of the paths.",
  });
  const [signal, signal_note, signal_figure] = picture("signal", "Signal and noise, over t", { role: "img" });
  const [errors, errors_note, errors_figure] = picture("errors", "Error of x_0 for an error of 1, over t", { role: "img" });
  const [quality, quality_note, quality_figure] = picture("quality", "Distance to the data, over steps", { role: "img" });
  const play = button("Play", () => toggle());
  const spoken = element("p", { class: "plane-spoken", "aria-live": "polite" });

  const fixed = (digits) => (v) => v.toFixed(digits);
  root.append(
    box("pair", left_figure, right_figure),
    box("time", play, slider("t", "t", [-1, 999, 1], (t) => (t < 0 ? "-1, clean" : `${t}`))),
    box("controls",
      box("group",
        list("preset", "Data", Object.fromEntries([...Object.keys(Plane.PRESETS), "your own"].map((name) => [name, name]))),
        pills("tool", "Tool", { move: "move", a: "draw A", b: "draw B", erase: "erase" }),
        box("row", button("Clear", () => redata([], [], "a")), button("New noise", () => set({ seed: choice.seed + 1 })))),
      box("group",
        pills("schedule", "Schedule", SCHEDULES),
        pills("sampler", "Sampler", SHORT),
        slider("steps", "Steps", [0, STEPS.length - 1, 1], String, STEPS),
        slider("eta", "eta, of DDIM and DPM++", [0, 1, 0.05], fixed(2))),
      box("group",
        pills("prediction", "The network predicts", { eps: "eps", v: "v" }),
        slider("error", "Its error", [0, 0.3, 0.01], fixed(2))),
      box("group",
        pills("guide", "Class", { both: "both", a: "A", b: "B" }),
        slider("scale", "Guidance scale", [0, 8, 0.5], fixed(1)),
        list("paths", "Paths", { many: "from eight starts", one: "from one start", all: "of all samplers", none: "none" }),
        box("row", tick("score"), tick("density")))),
    box("charts", signal_figure, errors_figure, quality_figure),
    spoken,
  );

  // --- A choice and what follows from it
  function set(changes) {
    Object.assign(choice, changes);
    if (changes.preset && changes.preset !== "your own") [points, classes] = Plane.preset(changes.preset);
    const names = Object.keys(changes).join();
    if (["t", "tool", "score", "density"].includes(names)) return show();
    if (names === "paths") resample();
    else renew();
    show();
  }

  function redata(new_points, new_classes, tool = choice.tool) {
    [points, classes] = [new_points, new_classes];
    set({ preset: "your own", tool });
  }

  function renew() {
    schedule = Plane.schedule(choice.schedule);
    data = classes.length ? Plane.mixture(points, classes) : null;
    cloud = null;
    if (data) {
      const noise = Plane.generator(choice.seed + 1000);
      cloud = { ...Plane.data_sample(data, N, noise), eps: noise.normal(2 * N) };
    }
    curves = {};
    resample();
  }

  // The class that guides; an empty class guides nowhere.
  function guide() {
    const c = { both: null, a: 0, b: 1 }[choice.guide];
    return classes.includes(c) ? c : null;
  }

  const settings = () => ({ ...choice, guide: guide() });

  // --- Work in slices of 10 ms, so that nothing waits for it
  let working = null;
  let again = false;
  let later = 0;

  function slices(work, done) {
    const ticket = (working = {});
    (function slice() {
      if (working !== ticket) return;
      for (const until = performance.now() + 10; performance.now() < until; ) {
        if (work.next().done) {
          working = null;
          return done();
        }
      }
      setTimeout(slice);
    })();
  }

  function resample() {
    clearTimeout(later);
    if (!data) return void (run = working = null);
    if (working?.needed) return void (again = true); // dragging shows what is under way
    const next = {};
    slices(sampling(next), () => {
      run = next;
      show();
      if (again) {
        again = false;
        return resample();
      }
      later = setTimeout(() => slices(measuring(), show), 120);
    });
    if (working) working.needed = true;
  }

  // The loop of plane.js under the reader's choice, or `more`.
  function loop(x_T, seed, more) {
    const used = { ...settings(), ...more };
    const noise = Plane.generator(seed);
    return Plane.sample_loop(schedule, Plane.network(data, schedule, used), x_T, () => noise.normal(x_T.length), used);
  }
  const first_noise = () => Plane.generator(choice.seed).normal(2 * N);
  const truth = () => Plane.data_sample(data, N, Plane.generator(99), guide()).points;

  function* sampling(next) {
    const [used, real] = [guide(), truth()];
    const x_T = first_noise();
    next.states = [{ t: schedule.T - 1, x: x_T }];
    next.ms = -performance.now();
    for (const state of loop(x_T, choice.seed + 1)) {
      next.states.push(state);
      next.ms += performance.now();
      yield;
      next.ms -= performance.now();
    }
    next.ms += performance.now();
    next.distance = Plane.distance(next.states.at(-1).x, real);
    next.floor = 0; // of real points
    for (const seed of [1, 2, 3, 4]) {
      yield;
      next.floor += Plane.distance(Plane.data_sample(data, N, Plane.generator(seed), used, true).points, real) / 4;
    }
    next.paths = yield* tracing(x_T);
  }

  // Eight paths, or four of each sampler.
  function* tracing(x_T) {
    const count = choice.paths === "all" ? 4 : 8;
    const samplers = { all: Object.keys(NAMES), none: [] }[choice.paths] ?? [choice.sampler];
    const from = x_T.slice(0, 2 * count).map((x, i) => (choice.paths === "many" ? x : start[i & 1]));
    const paths = [];
    for (const sampler of samplers) {
      const states = [{ t: schedule.T - 1, x: from }];
      for (const state of loop(from, choice.seed + 2, { sampler })) {
        states.push(state);
        yield;
      }
      paths.push({ sampler, states, count });
    }
    return paths;
  }

  function* measuring() {
    const real = truth();
    for (const [i, steps] of CURVE.entries()) {
      for (const sampler of Object.keys(NAMES)) {
        if (curves[sampler]?.[i]) continue; // measured before other work came in between
        let last;
        for (last of loop(first_noise(), choice.seed + 1, { sampler, steps })) yield;
        (curves[sampler] ??= []).push([steps, Plane.distance(last.x, real)]);
      }
      show();
    }
  }

  // --- Drawing
  let frame = 0;
  function show() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      Object.values(controls).forEach((refresh) => refresh());
      const style = getComputedStyle(root);
      const ink = Object.fromEntries(
        ["a", "b", "ddpm", "ddim", "dpm", "ink", "faint", "paper"].map((n) => [n, style.getPropertyValue(`--plane-${n}`).trim()]));
      ink["dpm++"] = ink.dpm;
      draw_forward(ink);
      draw_reverse(ink);
      draw_charts(ink);
    });
  }

  function canvas_of(canvas, ratio = 1) {
    const width = canvas.clientWidth;
    const scale = devicePixelRatio || 1;
    const [w, h] = [Math.round(width * scale), Math.round(width * ratio * scale)];
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    const g = canvas.getContext("2d");
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, width, width * ratio);
    g.lineJoin = g.lineCap = "round";
    return [g, width, width * ratio];
  }

  // Lines of [x, y] in pixels.
  function stroke(g, colour, width, lines, alpha = 1, dash = []) {
    [g.strokeStyle, g.lineWidth, g.globalAlpha] = [colour, width, alpha];
    g.setLineDash(dash);
    g.beginPath();
    for (const line of lines) line.forEach(([x, y], i) => (i ? g.lineTo(x, y) : g.moveTo(x, y)));
    g.stroke();
    g.globalAlpha = 1;
  }

  function plane_of(canvas, ink) {
    const [g, width] = canvas_of(canvas);
    const at = (x, y) => [(x / REACH + 1) * (width / 2), (1 - y / REACH) * (width / 2)];
    const cross = ([x, y], arm) => [[[x - arm, y], [x + arm, y]], [[x, y - arm], [x, y + arm]]];
    stroke(g, ink.faint, 0.5, cross(at(0, 0), width / 2));
    const circle = (x, y, radius) => {
      g.moveTo(at(x, y)[0] + radius, at(x, y)[1]);
      g.arc(...at(x, y), radius, 0, 7);
    };
    const dots = (x, radius, colour, keep = () => true) => {
      g.fillStyle = colour;
      g.beginPath();
      for (let i = 0; i < x.length; i += 2) if (keep(i / 2)) circle(x[i], x[i + 1], radius);
      g.fill();
    };
    const ring = (x, y) => {
      stroke(g, ink.ink, 2, []);
      circle(x, y, 9);
      g.stroke();
    };
    return { g, at, width, dots, ring, cross };
  }

  const GRID = 48;
  const shade = element("canvas", { width: GRID, height: GRID });

  function draw_density(g, width, t, ink) {
    const colours = [ink.a, ink.b].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    const m = new Float64Array(8);
    const cells = [];
    let highest = -Infinity;
    for (let i = 0; i < GRID * GRID; i++) {
      const x = (((i % GRID) + 0.5) / GRID) * 2 * REACH - REACH;
      const y = REACH - ((Math.floor(i / GRID) + 0.5) / GRID) * 2 * REACH;
      Plane.means(data, schedule.at(t), x, y, m);
      cells.push([m[7], m[6]]);
      highest = Math.max(highest, m[7]);
    }
    const brush = shade.getContext("2d");
    const image = brush.createImageData(GRID, GRID);
    cells.forEach(([log_density, share], i) => {
      colours[0].forEach((value, j) => (image.data[4 * i + j] = value + share * (colours[1][j] - value)));
      image.data[4 * i + 3] = 130 * Math.exp((log_density - highest) / 2);
    });
    brush.putImageData(image, 0, 0);
    g.imageSmoothingQuality = "high";
    g.drawImage(shade, 0, 0, width, width);
  }

  function draw_field({ g, at, width }, t, ink) {
    const across = width < 420 ? 15 : 19;
    const cell = (2 * REACH) / across;
    const x_t = Float64Array.from({ length: 2 * across ** 2 }, (_, i) =>
      ((i & 1 ? Math.floor(i / 2 / across) : (i >> 1) % across) + 0.5) * cell - REACH);
    const output = Plane.network(data, schedule, settings())(x_t, t);
    const eps = Plane.x_0_and_eps(schedule, x_t, t, output, choice.prediction)[1];
    const arrows = [];
    for (let i = 0; i < x_t.length; i += 2) {
      const half = (0.42 * cell) / (Math.hypot(eps[i], eps[i + 1]) + 0.6); // the direction is the score's, the length compressed
      const [dx, dy] = [-eps[i] * half, -eps[i + 1] * half];
      const tip = at(x_t[i] + dx, x_t[i + 1] + dy);
      const barb = (turn) => [tip[0] + 3.5 * Math.cos(turn), tip[1] + 3.5 * Math.sin(turn)];
      const angle = Math.atan2(-dy, dx);
      arrows.push([at(x_t[i] - dx, x_t[i + 1] - dy), tip], [barb(angle + 2.6), tip, barb(angle - 2.6)]);
    }
    stroke(g, ink.ink, 1, arrows, 0.55);
  }

  function draw_forward(ink) {
    const plane = plane_of(left, ink);
    const { g, at, dots, ring, cross, width } = plane;
    const b = classes.filter(Boolean).length;
    left.setAttribute("aria-label", `Data, ${classes.length - b} points of class A and ${b} of class B, their noised cloud and the score. `
      + "Arrow keys move a cross, space uses the tool there, delete erases.");
    if (!data) left_note.textContent = "Draw points of class A and of class B.";
    else {
      const t = Math.max(choice.t, 0); // without noise there is no score to draw: the first step's is shown
      if (choice.density) draw_density(g, width, t, ink);
      if (choice.score) draw_field(plane, t, ink);
      const x_t = Plane.q_sample(schedule, cloud.points, choice.t, cloud.eps);
      g.globalAlpha = 0.75;
      dots(x_t, 1.7, ink.a, (n) => !cloud.classes[n]);
      dots(x_t, 1.7, ink.b, (n) => cloud.classes[n]);
      g.globalAlpha = 1;
      dots(points, 4.2, ink.paper);
      dots(points, 3.2, ink.a, (k) => !classes[k]);
      dots(points, 3.2, ink.b, (k) => classes[k]);
      const bar = schedule.at(choice.t);
      left_note.textContent = `x_t = ${Math.sqrt(bar).toFixed(3)} x_0 + ${Math.sqrt(1 - bar).toFixed(3)} eps`;
    }
    if (classes.length === MOST) left_note.textContent += `; ${MOST} points, which is the most`;
    if (cursor) left_note.textContent += `; cross at ${cursor.map(fixed(2)).join(", ")}`;
    if (held >= 0) ring(points[2 * held], points[2 * held + 1]);
    if (cursor && document.activeElement === left) stroke(g, ink.ink, 1.5, cross(at(...cursor), 12));
  }

  // The number of the state that the sampler has at time t: the last one that it reached on its way down.
  function state_at(states, t) {
    let k = 0;
    while (k + 1 < states.length && states[k + 1].t >= t) k++;
    return k;
  }

  function draw_reverse(ink) {
    const { g, at, dots, ring } = plane_of(right, ink);
    const from_one = ["one", "all"].includes(choice.paths);
    if (!run || !data) return void (right_note.textContent = "");
    g.globalAlpha = 0.4;
    dots(points, 3, ink.a, (k) => !classes[k]);
    dots(points, 3, ink.b, (k) => classes[k]);
    const k = state_at(run.states, choice.t);
    g.globalAlpha = from_one ? 0.25 : 0.7;
    dots(run.states[k].x, 1.9, ink[choice.sampler]);
    g.globalAlpha = 1;
    for (const { sampler, states, count } of run.paths ?? []) {
      const passed = states.slice(0, state_at(states, choice.t) + 1);
      const lines = Array.from({ length: count }, (_, n) => passed.map(({ x }) => at(x[2 * n], x[2 * n + 1])));
      stroke(g, ink.paper, 3.4, lines, 0.5);
      stroke(g, ink[sampler], sampler === "ddpm" ? 1 : 1.6, lines, 0.9);
      dots(passed.at(-1).x, 4.6, ink.paper);
      dots(passed.at(-1).x, 3.4, ink[sampler]);
    }
    if (from_one) ring(...start);
    right_note.textContent = `${NAMES[choice.sampler]}, step ${k} of ${run.states.length - 1}`;
  }

  // x and y are [low, high, logarithmic]; a line is {values, colour, bold, dash, dots, name, at}.
  function chart(canvas, ink, { x, y, across, up, lines, mark, level }) {
    const [g, width, height] = canvas_of(canvas, 0.62);
    const [l, r, top, bottom] = [38, width - 10, 8, height - 22];
    const place = (v, [low, high, logarithmic], from, to) => {
      const f = logarithmic ? Math.log : Number;
      return from + ((f(Math.max(v, low)) - f(low)) / (f(high) - f(low))) * (to - from);
    };
    const at = ([u, v]) => [place(u, x, l, r), Math.max(place(v, y, bottom, top), top)];
    const level_at = (v) => [at([x[0], v]), at([x[1], v])];
    g.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    g.fillStyle = ink.ink;
    stroke(g, ink.faint, 1, up.map(level_at));
    stroke(g, ink.ink, 1, [level_at(level)], 1, [2, 4]);
    stroke(g, ink.ink, 1, [[at([mark, y[0]]), at([mark, y[1]])]], 0.6);
    g.textAlign = "right";
    for (const v of up) g.fillText(v >= 1000 ? v.toExponential(0).replace("+", "") : v, l - 5, at([x[0], v])[1] + 4);
    g.textAlign = "center";
    for (const v of across) g.fillText(v, Math.min(at([v, y[0]])[0], r - 8), height - 6);
    for (const { values, colour, bold, dash, dots, name, at: [name_x, name_y] = [] } of lines) {
      stroke(g, colour, bold ? 2.4 : 1.2, [values.map(at)], 1, dash);
      g.fillStyle = colour;
      for (const value of dots ? values : []) g.beginPath(), g.arc(...at(value), bold ? 3.2 : 2, 0, 7), g.fill();
      if (name) g.fillText(name, l + name_x * (r - l), top + name_y * (bottom - top));
    }
  }

  function draw_charts(ink) {
    const { t } = choice;
    const over_t = (value) => Array.from({ length: 101 }, (_, i) => Math.min(10 * i, 999)).map((t) => [t, value(t)]);
    const signal_of = (schedule) => over_t((t) => Math.sqrt(schedule.at(t)));
    const axis = { x: [0, 999], across: [0, 250, 500, 750, 999], mark: t };
    const others = Object.keys(SCHEDULES).filter((name) => name !== choice.schedule);
    chart(signal, ink, {
      ...axis, y: [0, 1], up: [0, 0.5, 1],
      lines: [
        ...others.map((name) => ({ values: signal_of(Plane.schedule(name)), colour: ink.faint })),
        { values: over_t((t) => Math.sqrt(1 - schedule.at(t))), colour: ink.b, dash: [5, 4], bold: true, name: "noise", at: [0.9, 0.12] },
        { values: signal_of(schedule), colour: ink.a, bold: true, name: "signal", at: [0.1, 0.25] },
      ],
    });
    signal_note.textContent = `at t = ${t}: ${Math.sqrt(schedule.at(t)).toFixed(3)}; thin: the other schedules`;
    const factor = (p) => over_t((t) => Plane.magnification(schedule, t, p));
    const bold = (p) => p === choice.prediction;
    chart(errors, ink, {
      ...axis, y: [0.01, 1e5, true], up: [0.01, 1, 100, 1e4],
      lines: [
        { values: factor("eps"), colour: ink.ddpm, bold: bold("eps"), name: "eps", at: [0.55, 0.42] },
        { values: factor("v"), colour: ink.ddim, bold: bold("v"), name: "v", at: [0.55, 0.85] },
      ],
    });
    const [from_eps, from_v] = ["eps", "v"].map((p) => {
      const size = Plane.magnification(schedule, t, p);
      return size >= 100 ? Math.round(size).toLocaleString("en") : size.toPrecision(2);
    });
    errors_note.textContent = `at t = ${t}: ${from_eps} from eps, ${from_v} from v`;
    const highest = Math.max(1.5, ...Object.values(curves).flat().map((p) => p[1]));
    chart(quality, ink, {
      x: [1, 200, true], y: [0.02, highest, true], across: [1, 2, 5, 12, 35, 100, 200],
      up: (highest > 30 ? [0.1, 1, 10, 100, 1000] : [0.03, 0.1, 0.3, 1, 3, 10]).filter((v) => v < highest), mark: choice.steps, level: run?.floor,
      lines: Object.keys(NAMES).map((sampler, i) => ({
        values: curves[sampler] ?? [], colour: ink[sampler], bold: sampler === choice.sampler, dots: true,
        name: SHORT[sampler], at: [0.15, 0.46 + 0.12 * i],
      })),
    });
    const steps = run?.states.length - 1;
    quality_note.textContent = run
      ? `${steps} step${steps > 1 ? "s" : ""}: ${run.distance.toFixed(2)}; dotted: fresh data, ${run.floor.toFixed(2)}` : "";
    for (const canvas of [signal, errors, quality]) canvas.setAttribute("aria-label", canvas.previousElementSibling.textContent);
    if (run) root.dataset.ms = run.ms.toFixed(1);
    clearTimeout(speech);
    speech = setTimeout(() => (spoken.textContent = [left_note, right_note, quality_note].map((n) => n.textContent).join(". ")), 700);
  }
  let speech = 0;

  // --- Hands
  const inside = (v) => Math.min(Math.max(v, -REACH), REACH);
  function world(canvas, { clientX, clientY }) {
    const { left, top, width } = canvas.getBoundingClientRect();
    return [(2 * (clientX - left)) / width - 1, 1 - (2 * (clientY - top)) / width].map((v) => inside(REACH * v));
  }

  function nearest([x, y], within) {
    let best = -1;
    for (let k = 0; k < classes.length; k++) {
      const d = Math.hypot(points[2 * k] - x, points[2 * k + 1] - y);
      if (d < within) [best, within] = [k, d];
    }
    return best;
  }

  const move = (k, [x, y]) => redata(points.with(2 * k, x).with(2 * k + 1, y), classes);

  function add([x, y]) {
    if (classes.length < MOST) redata([...points, x, y], [...classes, choice.tool === "b" ? 1 : 0]);
  }

  function erase(k) {
    if (k >= 0) redata(points.filter((_, i) => i >> 1 !== k), classes.filter((_, i) => i !== k));
  }

  let pencil = null; // where the tool was last used, while it is down
  const within = (event) => (event.pointerType === "mouse" ? 0.15 : 0.3);

  function use(at, event) {
    if (choice.tool === "erase") erase(nearest(at, within(event)));
    else if (!pencil || Math.hypot(at[0] - pencil[0], at[1] - pencil[1]) > 0.1) add((pencil = at));
  }
  left.onpointerdown = (event) => {
    const at = world(left, event);
    cursor = null;
    if (choice.tool === "move") held = nearest(at, within(event));
    else use(at, event), (pencil = at);
    if (held >= 0 || pencil) left.setPointerCapture(event.pointerId);
  };
  left.onpointermove = (event) => {
    const at = world(left, event);
    left.style.cursor = choice.tool !== "move" ? "crosshair" : nearest(at, 0.15) < 0 ? "default" : "grab";
    if (pencil) use(at, event);
    else if (held >= 0 && !cursor) move(held, at);
  };
  left.onpointerup = left.onpointercancel = () => {
    held = -1;
    pencil = null;
    show();
  };

  const lead = (at) => {
    start = at;
    set({ paths: choice.paths === "all" ? "all" : "one" });
  };
  let leading = false;
  const near_start = (event) => choice.paths !== "many" && Math.hypot(...world(right, event).map((v, j) => v - start[j])) < 0.4;
  right.onclick = (event) => lead(world(right, event));
  right.onpointerdown = (event) => {
    leading = near_start(event);
    if (leading) right.setPointerCapture(event.pointerId);
  };
  right.onpointermove = (event) => leading && lead(world(right, event));
  right.onpointerup = right.onpointercancel = () => (leading = false);

  // A finger on empty ground scrolls the page; one that moves something does not.
  const finger = (canvas, taken) =>
    canvas.addEventListener("touchstart", (event) => taken(event.touches[0]) && event.preventDefault(), { passive: false });
  finger(left, (touch) => choice.tool !== "move" || nearest(world(left, touch), 0.3) >= 0);
  finger(right, near_start);

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const moved = ([x, y], { key, shiftKey }) => {
    const by = shiftKey ? 0.02 : 0.1;
    return [x + by * ARROWS[key][0], y + by * ARROWS[key][1]].map(inside);
  };
  left.onkeydown = (event) => {
    const { key } = event;
    const away = key === "Delete" || key === "Backspace";
    if (!(key in ARROWS) && !away && key !== " " && key !== "Enter") return;
    event.preventDefault();
    cursor ??= [0, 0];
    if (key in ARROWS) {
      cursor = moved(cursor, event);
      if (held >= 0) move(held, cursor);
    } else if (held >= 0) held = -1;
    else if (away || choice.tool === "erase") erase(nearest(cursor, 0.5));
    else if (choice.tool !== "move") add(cursor);
    else {
      held = nearest(cursor, 0.5);
      if (held >= 0) cursor = [points[2 * held], points[2 * held + 1]];
    }
    show();
  };
  left.onblur = () => ((held = -1), show());
  right.onkeydown = (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    lead(moved(start, event));
  };

  // --- Play: never by itself, and without motion where the reader wants none
  let playing = false;
  function toggle() {
    if (playing) playing = false;
    else if (calm.matches) choice.t = choice.t < 0 ? 999 : -1;
    else {
      playing = true;
      if (choice.t < 0) choice.t = 999;
      let exact = choice.t;
      let before = performance.now();
      requestAnimationFrame(function pass(now) {
        if (!playing) return;
        if (Math.round(exact) !== choice.t) exact = choice.t; // the reader moved the slider
        exact = Math.max(exact - Math.max(now - before, 0) / 7, -1); // seven seconds for the chain
        before = now;
        choice.t = Math.round(exact);
        playing = choice.t >= 0;
        requestAnimationFrame(pass);
        show();
      });
    }
    show();
  }
  controls.play = () => {
    play.textContent = calm.matches ? (choice.t < 0 ? "To the start" : "To the end") : playing ? "Pause" : "Play";
  };

  for (const recipe of document.querySelectorAll("[data-try]")) {
    recipe.hidden = false;
    recipe.onclick = () => {
      const plain = { seed: 1, error: 0, eta: 0, guide: "both", scale: 1, prediction: "eps", tool: "move", paths: "many", t: -1 };
      playing = false;
      set({ ...plain, ...JSON.parse(recipe.dataset.try) });
      root.scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
    };
  }

  root.classList.add("plane-live");
  addEventListener("resize", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  calm.addEventListener("change", show);
  new MutationObserver(show).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  set({ preset: choice.preset });
});
