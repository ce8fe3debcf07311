// Diffusion in the plane, where the perfect network has a closed form. Pure functions: no page, no clock, no global noise.
// Points are a Float64Array x0 y0 x1 y1 ...; t is 0..T-1 as in ddpm/schedule.py, and -1 is the clean picture.
"use strict";
const Plane = (() => {
  const { sqrt, exp, log, log1p, sin, cos, min, max, floor, PI } = Math;

  // --- ddpm/schedule.py
  const BETA = {
    linear: (T, i) => (1000 / T) * (1e-4 + ((0.02 - 1e-4) * i) / (T - 1)),
    scaled_linear: (T, i) => (1000 / T) * (sqrt(0.00085) + ((sqrt(0.012) - sqrt(0.00085)) * i) / (T - 1)) ** 2,
    cosine(T, i) {
      const f = (time) => cos((((time / T + 0.008) / 1.008) * PI) / 2) ** 2;
      return min(1 - f(i + 1) / f(i), 0.999);
    },
  };

  function schedule(name, T = 1000) {
    const beta = Float64Array.from({ length: T }, (_, i) => BETA[name](T, i));
    let product = 1;
    const alpha_bar = beta.map((b) => (product *= 1 - b));
    return { name, T, beta, alpha_bar, at: (t) => (t < 0 ? 1 : alpha_bar[t]) };
  }

  // --- ddpm/diffusion.py
  function each(x, value) {
    const out = new Float64Array(x.length);
    for (let i = 0; i < out.length; i++) out[i] = value(i);
    return out;
  }

  const parts = (schedule, t) => [sqrt(schedule.at(t)), sqrt(1 - schedule.at(t))]; // of the data and of the noise in x_t

  function q_sample(schedule, x_0, t, eps) {
    const [a, sigma] = parts(schedule, t);
    return each(x_0, (i) => a * x_0[i] + sigma * eps[i]);
  }

  function v_from(schedule, x_0, t, eps) {
    const [a, sigma] = parts(schedule, t);
    return each(x_0, (i) => a * eps[i] - sigma * x_0[i]);
  }

  function x_0_and_eps(schedule, x_t, t, output, prediction) {
    const [a, sigma] = parts(schedule, t);
    if (prediction === "v") {
      return [each(x_t, (i) => a * x_t[i] - sigma * output[i]), each(x_t, (i) => sigma * x_t[i] + a * output[i])];
    }
    if (prediction === "x_0") return [output, each(x_t, (i) => (x_t[i] - a * output[i]) / sigma)];
    return [each(x_t, (i) => (x_t[i] - sigma * output[i]) / a), output];
  }

  // What an error of 1 in the output becomes in x_0.
  function magnification(schedule, t, prediction) {
    const [a, sigma] = parts(schedule, t);
    return prediction === "v" ? sigma : sigma / a;
  }

  // --- The perfect network. Data are a mixture of Gaussians of standard deviation `spread` around the points, of class 0 or 1:
  // q(x_t) = sum_k N(a mu_k, (a^2 spread^2 + sigma^2) I) / K, so E[eps | x_t] = sigma (x_t - a m) / (a^2 spread^2 + sigma^2),
  // where m is the mean of the mu_k, weighted by how likely each of them made x_t.
  function mixture(points, classes, spread = 0.06) {
    const K = classes.length;
    return { points: Float64Array.from(points), classes: Uint8Array.from(classes), spread, distance: new Float64Array(K) };
  }

  // Into out: m of class 0 (x, y), of class 1, of both; class 1's share of the density; the logarithm of the density.
  function means(data, alpha_bar, x, y, out) {
    const { points, classes, spread, distance } = data;
    const a = sqrt(alpha_bar);
    const half = 0.5 / (alpha_bar * spread * spread + 1 - alpha_bar);
    const K = classes.length;
    let least_0 = Infinity;
    let least_1 = Infinity;
    for (let k = 0; k < K; k++) {
      const dx = x - a * points[2 * k];
      const dy = y - a * points[2 * k + 1];
      const d = (dx * dx + dy * dy) * half;
      distance[k] = d;
      if (classes[k]) {
        if (d < least_1) least_1 = d;
      } else if (d < least_0) least_0 = d;
    }
    sums.fill(0); // weight, x and y of class 0, then of class 1, each relative to its nearest point
    for (let k = 0; k < K; k++) {
      const far = distance[k] - (classes[k] ? least_1 : least_0);
      if (far > 30) continue; // exp(-30) is 1e-13
      const weight = exp(-far);
      const c = 3 * classes[k];
      sums[c] += weight;
      sums[c + 1] += weight * points[2 * k];
      sums[c + 2] += weight * points[2 * k + 1];
    }
    const nearest = min(least_0, least_1);
    const w_0 = exp(nearest - least_0);
    const w_1 = exp(nearest - least_1);
    const total = w_0 * sums[0] + w_1 * sums[3];
    for (let j = 0; j < 2; j++) {
      out[4 + j] = (w_0 * sums[1 + j] + w_1 * sums[4 + j]) / total;
      out[j] = sums[0] ? sums[1 + j] / sums[0] : out[4 + j]; // an empty class is replaced by both
      out[2 + j] = sums[3] ? sums[4 + j] / sums[3] : out[4 + j];
    }
    out[6] = (w_1 * sums[3]) / total;
    out[7] = log((total * half) / (PI * classes.length)) - nearest;
    return out;
  }
  const sums = new Float64Array(6);

  // E[eps | x_t], guided as in sampling.guided: scale 0 is both classes, scale 1 the class `guide`; null is both.
  function exact_eps(data, schedule, x_t, t, guide = null, scale = 1) {
    const alpha_bar = schedule.at(t);
    const a = sqrt(alpha_bar);
    const factor = sqrt(1 - alpha_bar) / (alpha_bar * data.spread ** 2 + 1 - alpha_bar);
    const m = new Float64Array(8);
    const of = guide === null ? 4 : 2 * guide;
    return each(x_t, (i) => {
      if (!(i & 1)) means(data, alpha_bar, x_t[i], x_t[i + 1], m);
      const uncond = factor * (x_t[i] - a * m[4 + (i & 1)]);
      const cond = factor * (x_t[i] - a * m[of + (i & 1)]);
      return uncond + scale * (cond - uncond);
    });
  }

  // A smooth error of mean square 1 per coordinate, the same at every visit, as a network's is.
  function wobble(x, y, u, j) {
    return sqrt(2) * sin(j ? 2.1 * y - 1.4 * x + 4 + 7 * u : 1.9 * x + 1.3 * y + 2 + 9 * u);
  }

  // The network that the page plays: exact, guided, then wrong by `error` in eps or in v.
  function network(data, schedule, { guide = null, scale = 1, error = 0, prediction = "eps" }) {
    return (x_t, t) => {
      const eps = exact_eps(data, schedule, x_t, t, guide, scale);
      const output = prediction === "v" ? v_from(schedule, x_0_and_eps(schedule, x_t, t, eps, "eps")[0], t, eps) : eps;
      if (error) {
        for (let i = 0; i < x_t.length; i++) output[i] += error * wobble(x_t[i & ~1], x_t[i | 1], t / schedule.T, i & 1);
      }
      return output;
    };
  }

  // --- ddpm/sampling.py
  function round_half_even(value) {
    const below = floor(value);
    const over = value - below;
    return over === 0.5 ? below + (below % 2) : floor(value + 0.5);
  }

  const timesteps = (T, steps) => Array.from({ length: steps }, (_, k) => round_half_even(T - (k * T) / steps) - 1);

  function ddpm_step(schedule, x_t, t, s, x_0, noise) {
    const bar_t = schedule.at(t);
    const bar_s = schedule.at(s);
    const alpha_ts = bar_t / bar_s;
    const of_x_0 = (sqrt(bar_s) * (1 - alpha_ts)) / (1 - bar_t);
    const of_x_t = (sqrt(alpha_ts) * (1 - bar_s)) / (1 - bar_t);
    const sigma = sqrt(((1 - bar_s) / (1 - bar_t)) * (1 - alpha_ts)); // 0 at the last step
    return each(x_t, (i) => of_x_0 * x_0[i] + of_x_t * x_t[i] + sigma * noise[i]);
  }

  function ddim_step(schedule, x_t, t, s, x_0, eps, noise, eta = 0) {
    const bar_t = schedule.at(t);
    const bar_s = schedule.at(s);
    const sigma_2 = ((eta ** 2 * (1 - bar_s)) / (1 - bar_t)) * (1 - bar_t / bar_s);
    const direction = sqrt(max(1 - bar_s - sigma_2, 0));
    return each(x_t, (i) => sqrt(bar_s) * x_0[i] + direction * eps[i] + sqrt(sigma_2) * noise[i]);
  }

  const log_snr = (alpha_bar) => 0.5 * (log(alpha_bar) - log1p(-alpha_bar));

  function dpmpp_2m_step(schedule, x_t, t, s, x_0, previous, noise, eta = 0) {
    let D = x_0;
    if (previous && s >= 0) {
      const lambda = log_snr(schedule.at(t));
      const h = log_snr(schedule.at(s)) - lambda;
      const weight = h / (2 * (lambda - log_snr(schedule.at(previous.t))));
      D = each(x_0, (i) => x_0[i] + weight * (x_0[i] - previous.x_0[i]));
    }
    return ddim_step(schedule, x_t, t, s, D, x_0_and_eps(schedule, x_t, t, D, "x_0")[1], noise, eta);
  }

  // Yields {t, x} after every step; t is the time of x. A generator, so that a page may pause between two steps.
  function* sample_loop(schedule, denoise, x_T, draw, { sampler = "dpm++", steps = 20, prediction = "eps", eta = 0 }) {
    const times = timesteps(schedule.T, steps);
    const still = new Float64Array(x_T.length);
    let x = x_T;
    let previous = null;
    for (let i = 0; i < steps; i++) {
      const t = times[i];
      const s = i + 1 < steps ? times[i + 1] : -1;
      const [x_0, eps] = x_0_and_eps(schedule, x, t, denoise(x, t), prediction);
      const noise = eta > 0 || sampler === "ddpm" ? draw() : still;
      if (sampler === "ddpm") x = ddpm_step(schedule, x, t, s, x_0, noise);
      else if (sampler === "ddim") x = ddim_step(schedule, x, t, s, x_0, eps, noise, eta);
      else {
        x = dpmpp_2m_step(schedule, x, t, s, x_0, previous, noise, eta);
        previous = { t, x_0 };
      }
      yield { t: s, x };
    }
  }

  // --- Noise, data and distance
  function generator(seed) {
    const uniform = () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let z = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      z = (z + Math.imul(z ^ (z >>> 7), 61 | z)) ^ z;
      return ((z ^ (z >>> 14)) >>> 0) / 4294967296;
    };
    const normal = (n) => each(new Float64Array(n), () => sqrt(-2 * log(1 - uniform())) * cos(2 * PI * uniform()));
    return { uniform, normal };
  }

  const PRESETS = {
    "two moons"(u, c) {
      const angle = PI * u;
      return c ? [0.65 - 1.3 * cos(angle), 0.35 - 1.3 * sin(angle)] : [1.3 * cos(angle) - 0.65, 1.3 * sin(angle) - 0.35];
    },
    "four clusters"(u, c, noise) {
      const side = u < 0.5 ? -1.1 : 1.1;
      return [side + 0.16 * noise[0], (c ? side : -side) + 0.16 * noise[1]];
    },
    spiral(u, c) {
      const angle = 4.2 * sqrt(0.03 + u) + PI * c;
      return [0.42 * (angle - PI * c) * cos(angle), 0.42 * (angle - PI * c) * sin(angle)];
    },
    rings(u, c) {
      const radius = c ? 0.7 : 1.6;
      return [radius * cos(2 * PI * u), radius * sin(2 * PI * u)];
    },
  };

  // `count` points of a preset, half of each class, as [points, classes].
  function preset(name, count = 100) {
    const { normal } = generator(7);
    const classes = Array.from({ length: count }, (_, i) => i % 2);
    const points = classes.flatMap((c, i) => PRESETS[name](((i >> 1) + 0.5) / (count / 2), c, normal(2)));
    return [points, classes];
  }

  // n fresh points of the data, or of its class c, and the class of each: a Gaussian around every centre in turn, or around any.
  function data_sample(data, n, { normal, uniform }, c = null, any = false) {
    const centres = [...data.classes.keys()].filter((k) => c === null || data.classes[k] === c);
    const noise = normal(2 * n);
    const chosen = Array.from({ length: n }, (_, i) => centres[floor(centres.length * (any ? uniform() : i / n))]);
    const points = each(noise, (i) => data.points[2 * chosen[i >> 1] + (i & 1)] + data.spread * noise[i]);
    return { points, classes: chosen.map((k) => data.classes[k]) };
  }

  // Sliced Wasserstein distance: the mean distance of sorted projections, over evenly spaced directions.
  function distance(p, q, directions = 24) {
    const n = min(p.length, q.length) / 2;
    let sum = 0;
    for (let d = 0; d < directions; d++) {
      const c = cos((PI * d) / directions);
      const s = sin((PI * d) / directions);
      const [a, b] = [p, q].map((x) => Float64Array.from({ length: n }, (_, i) => c * x[2 * i] + s * x[2 * i + 1]).sort());
      for (let i = 0; i < n; i++) sum += Math.abs(a[i] - b[i]);
    }
    return sum / (n * directions);
  }

  return {
    schedule, q_sample, v_from, x_0_and_eps, magnification, mixture, means, exact_eps, network, timesteps, ddpm_step, ddim_step,
    dpmpp_2m_step, sample_loop, generator, PRESETS, preset, data_sample, distance,
  };
})();
