"use strict";
// Texts come from configurations and logs: they are set as textContent, never as HTML.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const root = document.documentElement;
  const COLOURS = 8;
  const DASHES = ["solid", [7, 4], [2, 3], [9, 3, 2, 3]];
  const SHAPES = ["circle", "triangle", "rect", "diamond", "arrow"];
  const MOST_BARS = 40;
  const ROWS_OF_TIP = 12;
  const AXES = { round: "round", mb: "cumulative MB (1e6 bytes)", seconds: "wall time (s)", simulated: "simulated time (s)" };
  const COSTS = {
    mb: "MB, both ways", upMb: "MB up", sparsity: "sparsity", flops: "FLOPs of a forward pass",
    trainFlops: "FLOPs of all training", simulated: "simulated time (s)", joules: "simulated energy (J)", seconds: "wall time (s)",
  };
  const state = {
    off: data.facets.map(() => new Set()), // values that are switched off, by facet
    lines: data.groups.length > data.few ? "best" : "every",
  };
  const charts = new Map();
  const notes = new Map(); // by chart: its title, and what the arrow keys step through

  // -- small helpers ---------------------------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function colours() {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    return {
      ink: of("ink"), soft: of("soft"), rule: of("rule"), paper: of("paper"), panel: of("panel"), accent: of("accent"),
      lines: Array.from({ length: COLOURS }, (_, at) => of(`c${at}`)),
    };
  }

  function number(value, digits = 4) {
    if (value === null || value === undefined) return "-";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 2);
    if (Number.isInteger(value)) return value.toLocaleString("en-GB");
    const decimals = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : digits;
    return value.toLocaleString("en-GB", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  }

  // Ticks of an axis: as short as the number allows.
  function tick(value) {
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    return String(+value.toPrecision(6));
  }

  const spread = (stat) => (stat ? number(stat[0]) + (stat[1] === null ? "" : ` ± ${number(stat[1])}`) : "-");
  const rises = (metric) => data.rising[metric] !== false;
  const methodOf = (group) => (data.methodAt < 0 ? group.label : group.values[data.methodAt]);
  const methods = data.methodAt < 0 ? data.groups.map((group) => group.label) : data.methods;
  const rankOf = new Map(methods.map((name, at) => [name, at]));
  // Shapes go round sooner than colours, so that no two of forty methods share both.
  const shapeAt = (rank) => SHAPES[rank % SHAPES.length];
  const shapeOf = (group) => shapeAt(rankOf.get(methodOf(group)));

  function tip(title, rows, footer) {
    const body = make("tbody");
    for (const [mark, name, value, near] of rows) {
      const swatch = make("td");
      if (mark) {
        const dot = make("span");
        dot.style.cssText = "display:inline-block;width:10px;height:10px;border-radius:5px";
        dot.style.background = mark;
        swatch.append(dot);
      }
      body.append(make("tr", near ? { class: "near" } : {}, swatch, make("td", {}, name), make("td", { class: "number" }, value)));
    }
    const box = make("div", { class: "tip" }, make("b", {}, title), make("table", {}, body));
    if (footer) box.append(make("div", {}, footer));
    return box;
  }

  // -- which settings are shown ----------------------------------------------------------------------------------------

  function passing() {
    return data.groups.filter((group) => data.facets.every((facet, at) => !state.off[at].has(group.values[facet.at])));
  }

  // The settings that charts have a line or a bar for.
  function lines() {
    const groups = passing();
    if (state.lines === "every") return groups;
    const best = new Map();
    const sign = rises(data.headline) ? 1 : -1;
    for (const group of groups) {
      const value = group.final[data.headline];
      if (!value) continue;
      const held = best.get(methodOf(group));
      if (!held || sign * value[0] > sign * held.final[data.headline][0]) best.set(methodOf(group), group);
    }
    return groups.filter((group) => best.get(methodOf(group)) === group);
  }

  // Colours belong to methods while charts have a line for each, and dashes tell the settings of a method apart. As
  // long as there are enough pairs of both, no two settings have the same one.
  function looks(groups, palette) {
    const found = new Map();
    const used = new Set();
    const several = new Map(); // settings by the rank of their method
    const few = groups.length <= COLOURS * 2 && new Set(groups.map(methodOf)).size === 1;
    groups.forEach((group, at) => {
      const rank = few ? at : rankOf.get(methodOf(group));
      several.set(rank, [...(several.get(rank) || []), group]);
    });
    const take = (group, [colour, dash]) => {
      used.add(`${colour} ${dash}`);
      found.set(group, { colour: palette.lines[colour], dash: DASHES[dash] });
    };
    const free = ([colour, dash]) => !used.has(`${colour} ${dash}`);
    const own = (rank, seen) => [rank % COLOURS, (Math.floor(rank / COLOURS) + seen) % DASHES.length];
    const taken = new Set([...several.keys()].map((rank) => rank % COLOURS));
    const choose = (rank, seen) => {
      if (groups.length > COLOURS * DASHES.length) return own(rank, seen);
      const colour = (more) => (rank + more) % COLOURS;
      // Colours that no method has come before those of others.
      const mine = [0], others = Array.from({ length: COLOURS - 1 }, (_, at) => at + 1);
      const nobodys = others.filter((more) => !taken.has(colour(more)));
      const pairs = [...mine, ...nobodys, ...others].flatMap((more) => DASHES.map((_, at) => [colour(more), own(rank, seen + at)[1]]));
      return pairs.find(free) || own(rank, seen);
    };
    // The first setting of each method comes first: it looks as the method's button does.
    for (const [rank, [first]] of several) take(first, choose(rank, 0));
    for (const [rank, [, ...rest]] of several) rest.forEach((group, at) => take(group, choose(rank, at + 1)));
    return found;
  }

  // The line of a method as charts draw it: its colour, and its dashes from the second round of colours on.
  function swatch(rank, palette) {
    const space = "http://www.w3.org/2000/svg";
    const made = document.createElementNS(space, "svg");
    const line = document.createElementNS(space, "line");
    for (const [name, value] of Object.entries({ viewBox: "0 0 26 8", class: "swatch", "aria-hidden": "true" })) made.setAttribute(name, value);
    const dash = DASHES[Math.floor(rank / COLOURS) % DASHES.length];
    const look = { x1: 0, x2: 26, y1: 4, y2: 4, stroke: palette.lines[rank % COLOURS], "stroke-dasharray": dash === "solid" ? "" : dash.join(" ") };
    for (const [name, value] of Object.entries(look)) line.setAttribute(name, value);
    made.append(line);
    return made;
  }

  function buildFacets() {
    const place = byId("facets");
    const palette = colours();
    place.replaceChildren();
    data.facets.forEach((facet, at) => {
      const box = make("div", { class: "facet", role: "group", "aria-label": facet.name }, make("span", { class: "name" }, facet.name));
      facet.values.forEach((value) => {
        const button = make("button", { type: "button", "data-facet": facet.key, "data-value": value });
        button.setAttribute("aria-pressed", String(!state.off[at].has(value)));
        if (facet.key === data.method) {
          button.append(swatch(rankOf.get(value), palette));
        }
        const name = value === "-" ? `no ${facet.name}` : value;
        button.title = name;
        button.append(make("span", {}, name));
        button.addEventListener("click", () => {
          if (!state.off[at].delete(value)) state.off[at].add(value);
          button.setAttribute("aria-pressed", String(!state.off[at].has(value)));
          changed();
        });
        box.append(button);
      });
      place.append(box);
    });
    if (data.groups.length <= 1) byId("filters").hidden = true;
  }

  function changed() {
    const shown = new Set(passing());
    for (const row of document.querySelectorAll("#table tbody tr")) row.hidden = !shown.has(data.groups[Number(row.dataset.group)]);
    markBest();
    const drawn = lines().length;
    byId("shown").textContent = `${shown.size} of ${data.groups.length} settings; ${drawn} ${drawn === 1 ? "line" : "lines"} in charts`;
    for (const button of document.querySelectorAll("[data-lines]")) {
      button.setAttribute("aria-pressed", String(button.dataset.lines === state.lines));
    }
    drawAll();
  }

  // -- the table -------------------------------------------------------------------------------------------------------

  function markBest() {
    const rows = [...document.querySelectorAll("#table tbody tr")];
    document.querySelectorAll("#table thead th").forEach((head, at) => {
      const rising = Number(head.dataset.rising || 0);
      if (!rising) return;
      const values = rows.filter((row) => !row.hidden && "value" in row.cells[at].dataset).map((row) => Number(row.cells[at].dataset.value));
      const best = rising > 0 ? Math.max(...values) : Math.min(...values);
      const equal = values.every((value) => value === best);
      for (const row of rows) {
        const found = "value" in row.cells[at].dataset && Number(row.cells[at].dataset.value) === best;
        row.cells[at].classList.toggle("best", found && !equal && !row.hidden);
      }
    });
  }

  function sortable() {
    const heads = [...document.querySelectorAll("#table thead th")];
    heads.forEach((head, at) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const was = head.getAttribute("aria-sort");
        const first = head.dataset.kind === "number" && head.dataset.rising !== "-1" ? "descending" : "ascending";
        const way = was === null ? first : was === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", way);
        const sign = way === "ascending" ? 1 : -1;
        const body = document.querySelector("#table tbody");
        const key = (row) => {
          const cell = row.cells[at];
          if (head.dataset.kind === "number") return "value" in cell.dataset ? Number(cell.dataset.value) : null;
          return cell.textContent;
        };
        const compare = (one, other) => {
          const a = key(one), b = key(other);
          if (a === null || b === null) return (a === null) - (b === null); // what is missing stays at the end
          return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
        };
        body.append(...[...body.rows].sort(compare));
      });
    });
  }

  // -- charts ----------------------------------------------------------------------------------------------------------

  function base(palette, zoom = false) {
    return {
      animation: false,
      textStyle: { fontFamily: "system-ui, sans-serif", color: palette.ink },
      grid: { left: 64, right: 24, top: 34, bottom: 48 },
      tooltip: {
        confine: true, backgroundColor: palette.panel, borderColor: palette.rule, textStyle: { color: palette.ink },
        extraCssText: "box-shadow: 0 2px 10px rgba(0,0,0,.25)",
      },
      toolbox: {
        show: !state.printing, right: 12, top: 4, itemSize: 13, iconStyle: { borderColor: palette.soft },
        feature: {
          ...(zoom ? { dataZoom: { title: { zoom: "Zoom into a box", back: "Zoom out" }, filterMode: "none" } } : {}),
          saveAsImage: { type: "svg", title: "Save as SVG", backgroundColor: palette.paper },
        },
      },
    };
  }

  function axis(palette, name, more = {}) {
    return {
      type: "value", name, nameLocation: "middle", nameGap: 30, scale: true,
      nameTextStyle: { color: palette.soft, fontSize: 13 },
      axisLabel: { color: palette.soft, formatter: tick, hideOverlap: true },
      axisLine: { show: true, lineStyle: { color: palette.soft } },
      splitLine: { lineStyle: { color: palette.rule } },
      ...more,
    };
  }

  // A chart is made once; null, with a sentence, stands for one that has nothing to show.
  function draw(id, option, empty, height) {
    const place = byId(id);
    if (!place) return;
    let chart = charts.get(id);
    if (!option) {
      if (chart) { chart.dispose(); charts.delete(id); }
      place.classList.add("empty");
      place.textContent = empty;
      return;
    }
    if (place.classList.contains("empty")) {
      place.classList.remove("empty");
      place.textContent = "";
    }
    if (height) place.style.height = `${height}px`;
    if (!chart) {
      chart = echarts.init(place, null, { renderer: "svg" });
      charts.set(id, chart);
      if (id === "chart-curves") followPointer(chart);
    } else if (height) {
      chart.resize();
    }
    // The library clones what it is given, so what is ours does not go in.
    const { fedray, ...theirs } = option;
    notes.set(id, fedray);
    chart.setOption(theirs, { notMerge: true });
    place.setAttribute("aria-label", `${fedray.title}. ${place.dataset.about}`);
  }

  function mean(values) {
    const kept = values.filter((value) => value !== null);
    return kept.length ? kept.reduce((sum, value) => sum + value, 0) / kept.length : null;
  }

  function deviation(values, middle) {
    if (values.length < 2) return null;
    return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
  }

  const AXIS_AT = { round: 0, mb: 1, seconds: 2, simulated: 3 };

  // Points of a group's curve: x, mean, deviation and round, where every seed has a value, and one curve for each seed.
  function curve(group, metric, across) {
    const found = group.series[metric];
    if (!found) return null;
    const [grid, ...seeds] = found;
    const xs = group.grids[grid][AXIS_AT[across]];
    if (!xs) return null;
    const rounds = group.grids[grid][0];
    const points = [];
    rounds.forEach((round, at) => {
      const values = seeds.map((seed) => seed[at]);
      if (xs[at] === null || values.includes(null)) return;
      const middle = mean(values);
      points.push([xs[at], middle, deviation(values, middle), round]);
    });
    return {
      points,
      seeds: seeds.map((seed) => seed.map((value, at) => [xs[at], value]).filter(([x, y]) => x !== null && y !== null)),
    };
  }

  const pointer = { y: null };
  function followPointer(chart) {
    chart.getZr().on("mousemove", (event) => { pointer.y = event.offsetY; });
    chart.getZr().on("globalout", () => { pointer.y = null; });
  }

  function curvesOption(id, metric, across, { band, seeds, log }) {
    const palette = colours();
    const groups = lines();
    const look = looks(groups, palette);
    const known = groups.map((group) => [group, curve(group, metric, across)]).filter(([, found]) => found && found.points.length);
    if (!known.length) return null;
    const drawn = log && across !== "round"
      ? known.map(([group, found]) => [group, { points: found.points.filter(([x]) => x > 0), seeds: found.seeds.map((seed) => seed.filter(([x]) => x > 0)) }])
      : known;
    const series = [];
    for (const [group, found] of drawn) {
      const { colour, dash } = look.get(group);
      const outline = found.points.filter((point) => point[2] !== null);
      if (band && outline.length > 1 && drawn.length <= data.few) {
        series.push({
          type: "custom", silent: true, clip: true, z: 1, data: [[outline[0][0], outline[0][1]]], tooltip: { show: false },
          renderItem: (_, api) => ({
            type: "polygon",
            shape: {
              points: [
                ...outline.map(([x, y, wide]) => api.coord([x, y + wide])),
                ...outline.map(([x, y, wide]) => api.coord([x, y - wide])).reverse(),
              ],
            },
            style: { fill: colour, opacity: 0.13 },
          }),
        });
      }
      if (seeds && found.seeds.length > 1) {
        for (const points of found.seeds) {
          series.push({
            type: "line", data: points, showSymbol: false, silent: true, z: 2,
            lineStyle: { color: colour, width: 0.8, opacity: 0.55 }, itemStyle: { color: colour },
          });
        }
      }
      series.push({
        type: "line", name: group.label, data: found.points.map(([x, y]) => [x, y]), z: 3,
        showSymbol: found.points.length === 1, symbol: shapeOf(group), symbolSize: 7, connectNulls: false,
        lineStyle: { color: colour, width: drawn.length > 40 ? 1.2 : 2.2, type: dash }, itemStyle: { color: colour },
      });
    }
    const digits = (value) => (across === "round" ? `round ${number(Math.round(value))}` : `${number(value, 2)} ${across === "mb" ? "MB" : "s"}`);
    return {
      ...base(palette, true),
      fedray: {
        title: `${metric} against ${AXES[across]}, ${drawn.length} lines`,
        steps: drawn.map(([group, found]) => ({
          name: group.label, points: found.points, colour: look.get(group).colour,
          say: ([x, y, wide, round]) => `${group.label}: ${number(y)}${wide === null ? "" : ` ± ${number(wide)}`} at round ${round}${across === "round" ? "" : `, ${digits(x)}`}`,
        })),
      },
      xAxis: axis(palette, AXES[across], log && across !== "round" ? { type: "log", scale: true } : { scale: false, max: "dataMax" }),
      yAxis: axis(palette, metric, { nameGap: 46 }),
      tooltip: {
        ...base(palette).tooltip, trigger: "axis",
        axisPointer: { type: "line", snap: false, lineStyle: { color: palette.soft }, label: { show: false } },
        formatter: (params) => {
          const at = params.length ? params[0].axisValue : null;
          if (at === null) return "";
          const chart = charts.get(id);
          const height = pointer.y === null || !chart ? null : chart.convertFromPixel({ yAxisIndex: 0 }, pointer.y);
          let rows = [];
          for (const [group, found] of drawn) {
            // The last recorded point up to the pointer: nothing is made up between two.
            const before = found.points.filter(([x]) => x <= at + 1e-9).at(-1);
            if (before) rows.push([group, before]);
          }
          const gap = ([, point]) => (height === null ? 0 : Math.abs(point[1] - height));
          const nearest = rows.length && height !== null ? rows.reduce((one, other) => (gap(other) < gap(one) ? other : one)) : null;
          const hidden = Math.max(0, rows.length - ROWS_OF_TIP);
          if (hidden && height !== null) rows = rows.sort((one, other) => gap(one) - gap(other)).slice(0, ROWS_OF_TIP);
          rows.sort((one, other) => (rises(metric) ? other[1][1] - one[1][1] : one[1][1] - other[1][1]));
          rows = rows.slice(0, ROWS_OF_TIP);
          return tip(
            `${metric} at ${digits(at)}`,
            rows.map((row) => [
              look.get(row[0]).colour, row[0].label,
              `${number(row[1][1])}${row[1][2] === null ? "" : ` ± ${number(row[1][2])}`}${across === "round" ? "" : ` (round ${row[1][3]})`}`,
              row === nearest,
            ]),
            hidden ? `and ${hidden} more` : "",
          );
        },
      },
      series,
    };
  }

  function drawCurves() {
    const metric = byId("metric").value;
    const across = byId("across").value;
    draw(
      "chart-curves",
      curvesOption("chart-curves", metric, across, { band: byId("band").checked, seeds: byId("seeds").checked, log: byId("log").checked }),
      `None of the settings that are shown has recorded ${metric} against ${AXES[across]}.`,
    );
    byId("log").disabled = across === "round";
    byId("band").disabled = lines().length > data.few;
    byId("band").parentElement.title = byId("band").disabled ? `Bands are drawn for up to ${data.few} lines` : "";
  }

  // Settings that no other beats in both cost and value.
  function front(points, cheapIsLow, up) {
    const sorted = [...points].sort((one, other) => (cheapIsLow ? one.x - other.x : other.x - one.x) || (up ? other.y - one.y : one.y - other.y));
    const kept = [];
    for (const point of sorted) {
      const last = kept.at(-1);
      if (!last || (up ? point.y > last.y : point.y < last.y)) kept.push(point);
    }
    return kept;
  }

  function drawFront() {
    const palette = colours();
    const cost = byId("cost").value, when = byId("front-when").value, log = byId("front-log").checked;
    const metric = data.headline;
    const up = rises(metric);
    const points = passing()
      .map((group) => ({ group, x: group.cost[cost], y: (group[when][metric] || [null])[0], stat: group[when][metric] }))
      .filter((point) => point.x !== undefined && point.x !== null && point.y !== null && (!log || point.x > 0));
    if (!points.length) return draw("chart-front", null, `None of the settings that are shown has recorded ${metric} and ${COSTS[cost]}.`);
    const best = front(points, cost !== "sparsity", up);
    const onFront = new Set(best.map((point) => point.group));
    const present = methods.filter((name) => points.some((point) => methodOf(point.group) === name));
    const xs = points.map((point) => point.x), least = Math.min(...xs), widest = Math.max(...xs) - least;
    // Names near an edge go inwards.
    const sideOf = (x) => (x - least < 0.15 * widest ? "left" : x - least > 0.85 * widest ? "right" : "center");
    const label = (point) => `${point.group.label}: ${spread(point.stat)} at ${number(point.x, 2)} ${COSTS[cost]}${onFront.has(point.group) ? ", on the front" : ""}`;
    draw("chart-front", {
      ...base(palette, true),
      fedray: {
        title: `${metric} against ${COSTS[cost]}, ${points.length} settings, ${best.length} on the Pareto front`,
        steps: [{ name: "Pareto front", points: best, say: label, seriesIndex: 0 }],
      },
      grid: { left: 64, right: 24, top: 34, bottom: 48 },
      xAxis: axis(palette, COSTS[cost], log ? { type: "log" } : {}),
      yAxis: axis(palette, `${metric} ${when === "best" ? "(best round)" : "(at the end)"}`, { nameGap: 46 }),
      tooltip: {
        ...base(palette).tooltip, trigger: "item",
        formatter: (param) => {
          const point = points[param.data.at];
          return tip(point.group.label, [
            [param.color, metric, spread(point.stat)],
            ["", COSTS[cost], number(point.x, 2)],
            ["", "seeds", String(point.group.seeds.length)],
          ], onFront.has(point.group) ? "On the Pareto front" : "");
        },
      },
      series: [
        {
          type: "line", name: "Pareto front", z: 1, showSymbol: true, symbol: "circle", symbolSize: 13,
          data: best.map((point) => ({ value: [point.x, point.y], at: points.indexOf(point), label: { align: sideOf(point.x) } })),
          itemStyle: { color: "transparent", borderColor: palette.ink, borderWidth: 1.2 },
          lineStyle: { color: palette.ink, width: 1.3, type: [5, 4], opacity: 0.7 },
          label: { show: best.length <= data.few, position: "top", distance: 6, color: palette.ink, textBorderColor: palette.paper, textBorderWidth: 3, formatter: (param) => points[param.data.at].group.label },
          labelLayout: { hideOverlap: true },
        },
        ...present.map((name) => ({
          type: "scatter", name, z: 2, symbol: shapeAt(rankOf.get(name)), symbolSize: 9,
          itemStyle: { color: palette.lines[rankOf.get(name) % COLOURS], opacity: 0.9 },
          data: points.filter((point) => methodOf(point.group) === name).map((point) => ({ value: [point.x, point.y], at: points.indexOf(point) })),
        })),
      ],
    });
  }

  // Pixels for the names beside a chart: as many as they need, at most a third of it.
  function roomFor(id, names) {
    return Math.min(260, byId(id).clientWidth / 3, 34 + 6.7 * Math.max(...names.map((name) => name.length)));
  }

  const PARTS = ["values", "mask", "header"];

  function drawBytes() {
    const palette = colours();
    const groups = lines().filter((group) => group.bytes);
    const shown = groups.slice(0, MOST_BARS);
    if (!shown.length) return draw("chart-bytes", null, "None of the settings that are shown has recorded its bytes by part.");
    const names = shown.map((group) => group.label);
    const wide = roomFor("chart-bytes", names);
    const tints = { down: [0.95, 0.6, 0.32], up: [0.95, 0.6, 0.32] };
    const series = [];
    for (const [rank, way] of ["down", "up"].entries()) {
      PARTS.forEach((part, at) => {
        const colour = palette.lines[rank];
        series.push({
          type: "bar", name: `${way}: ${part}`, stack: way, barGap: "12%", barCategoryGap: "28%",
          data: shown.map((group) => group.bytes[way][at]),
          itemStyle: at === 0 ? { color: colour } : { color: colour, opacity: tints[way][at], decal: { symbol: "rect", dashArrayX: [1, 0], dashArrayY: at === 1 ? [2, 3] : [1, 1], rotation: at === 1 ? Math.PI / 4 : 0, color: palette.paper } },
        });
      });
    }
    const more = groups.length - shown.length;
    draw("chart-bytes", {
      ...base(palette),
      fedray: {
        title: `Megabytes by direction and part of ${shown.length} settings${more ? `, the first of ${groups.length}` : ""}`,
        steps: [{
          name: "settings", points: shown,
          say: (group) => `${group.label}: ${["down", "up"].map((way) => `${way} ${group.bytes[way].map((value, at) => `${number(value, 3)} MB ${PARTS[at]}`).join(", ")}`).join("; ")}`,
          seriesIndex: 0,
        }],
      },
      aria: { enabled: false, decal: { show: true } },
      legend: { top: 4, left: 8, right: 60, textStyle: { color: palette.ink }, itemHeight: 11, type: "plain" },
      grid: { left: wide, right: 24, top: window.innerWidth < 720 ? 76 : 44, bottom: more ? 66 : 48 },
      title: more ? { text: `${more} more settings are not shown; narrow them down above`, left: "center", bottom: 2, textStyle: { fontSize: 12, fontWeight: 400, color: palette.soft } } : undefined,
      yAxis: {
        type: "category", data: names, inverse: true,
        axisLabel: { color: palette.ink, width: wide - 16, overflow: "truncate", interval: 0 },
        axisLine: { lineStyle: { color: palette.soft } }, axisTick: { show: false },
      },
      xAxis: axis(palette, "MB, all rounds and clients", { scale: false, nameGap: 26 }),
      tooltip: {
        ...base(palette).tooltip, trigger: "axis", axisPointer: { type: "shadow" },
        formatter: (params) => {
          const group = shown[params[0].dataIndex];
          const rows = ["down", "up"].flatMap((way, rank) => [
            ...PARTS.map((part, at) => [palette.lines[rank], `${way}: ${part}`, `${number(group.bytes[way][at], 3)} MB`]),
          ]);
          return tip(group.label, rows);
        },
      },
      series,
    }, "", 110 + 34 * Math.max(3, shown.length));
  }

  function drawLayers() {
    const palette = colours();
    const group = data.groups[Number(byId("layer-group").value)];
    const layers = group && group.layers;
    byId("layer-note").textContent = layers && layers.of > layers.rounds.length ? `${layers.rounds.length} of ${layers.of} rounds, evenly picked` : "";
    if (!layers) return draw("chart-layers", null, "No setting has recorded the sparsity of its layers; runs without a mask have none.");
    const cells = [];
    layers.values.forEach((runs, line) => {
      let at = 0;
      for (const [value, times] of runs) for (let many = 0; many < times; many += 1, at += 1) if (value !== null) cells.push([at, line, value]);
    });
    const wide = roomFor("chart-layers", layers.names);
    draw("chart-layers", {
      ...base(palette),
      fedray: {
        title: `Sparsity of ${layers.names.length} layers of ${group.label}, seed ${layers.seed}`,
        steps: layers.names.map((name, line) => ({
          name, points: cells.filter((cell) => cell[1] === line),
          say: ([at, , value]) => `${name}: ${number(value)} after round ${layers.rounds[at]}`,
          index: (point) => cells.indexOf(point), seriesIndex: 0,
        })),
      },
      grid: { left: wide, right: 86, top: 30, bottom: 48 },
      xAxis: {
        type: "category", data: layers.rounds, name: "round", nameLocation: "middle", nameGap: 28, nameTextStyle: { color: palette.soft, fontSize: 13 },
        axisLabel: { color: palette.soft, hideOverlap: true }, axisLine: { lineStyle: { color: palette.soft } }, splitArea: { show: false },
      },
      yAxis: {
        type: "category", data: layers.names, inverse: true,
        axisLabel: { color: palette.ink, width: wide - 16, overflow: "truncate", interval: 0 }, axisLine: { lineStyle: { color: palette.soft } }, axisTick: { show: false },
      },
      visualMap: {
        min: 0, max: 1, calculable: false, orient: "vertical", right: 8, top: "middle", itemHeight: Math.min(150, 22 * layers.names.length), precision: 2, text: ["1", "0"],
        textStyle: { color: palette.soft }, inRange: { color: ["#fff3d6", "#f2b34c", "#c4543a", "#6a1f4f", "#1d0b30"] },
      },
      tooltip: {
        ...base(palette).tooltip,
        formatter: (param) => tip(layers.names[param.data[1]], [["", "round", number(layers.rounds[param.data[0]])], ["", "sparsity", number(param.data[2])]]),
      },
      series: [{ type: "heatmap", data: cells, progressive: 0, itemStyle: { borderWidth: 0 }, emphasis: { itemStyle: { borderColor: palette.ink, borderWidth: 1 } } }],
    }, "", 120 + Math.max(140, 22 * layers.names.length));
  }

  function drawClients() {
    const palette = colours();
    const groups = lines().filter((group) => group.clients).slice(0, MOST_BARS);
    const note = byId("client-note");
    if (!groups.length) {
      note.textContent = "";
      return draw("chart-clients", null, "No setting that is shown has tested its clients; eval.clients says whose local tests are reported.");
    }
    const [low, high] = groups[0].clients.range;
    const bins = groups[0].clients.counts.length;
    const names = groups.map((group) => group.label);
    const wide = roomFor("chart-clients", names);
    const cells = [];
    groups.forEach((group, line) => {
      const all = group.clients.counts.reduce((sum, count) => sum + count, 0);
      group.clients.counts.forEach((count, bin) => { if (count) cells.push([bin, line, count / all, count]); });
    });
    const most = Math.max(...cells.map((cell) => cell[2]));
    const rounds = [...new Set(groups.flatMap((group) => group.clients.rounds))].sort((one, other) => one - other);
    note.textContent = `${data.clientMetric} of single clients at the last round that tested them (${rounds.length > 3 ? `${rounds[0]} to ${rounds.at(-1)}` : rounds.join(", ")}), pooled over seeds, in ${bins} classes. Each client counts once, whatever its size.`;
    const total = (group) => group.clients.counts.reduce((sum, count) => sum + count, 0);
    const mark = (what, symbol, name, size) => ({
      type: "scatter", name, xAxisIndex: 1, yAxisIndex: 0, symbol, symbolSize: size, z: 5,
      itemStyle: { color: palette.paper, borderColor: palette.ink, borderWidth: 1.5 },
      data: groups.map((group, line) => [group.clients[what], line]),
    });
    draw("chart-clients", {
      ...base(palette),
      fedray: {
        title: `${data.clientMetric} over clients of ${groups.length} settings`,
        steps: [{
          name: "settings", points: groups, seriesIndex: 2,
          say: (group) => `${group.label}: 10th percentile ${number(group.clients.p10)}, mean ${number(group.clients.mean)}, 90th percentile ${number(group.clients.p90)}, ${total(group)} clients`,
        }],
      },
      legend: { top: 4, left: 8, data: ["10th percentile", "mean", "90th percentile"], textStyle: { color: palette.ink }, itemHeight: 11 },
      grid: { left: wide, right: 96, top: 40, bottom: 48 },
      xAxis: [
        { type: "category", data: Array.from({ length: bins }, (_, at) => at), show: false },
        axis(palette, data.clientMetric, { min: low, max: high, position: "bottom", splitLine: { show: false } }),
      ],
      yAxis: {
        type: "category", data: names, inverse: true,
        axisLabel: { color: palette.ink, width: wide - 16, overflow: "truncate", interval: 0 }, axisLine: { lineStyle: { color: palette.soft } }, axisTick: { show: false },
      },
      visualMap: {
        min: 0, max: most, seriesIndex: 0, dimension: 2, calculable: false, orient: "vertical", right: 6, top: "middle", itemHeight: Math.min(120, 20 * groups.length), precision: 2,
        text: [`${Math.round(100 * most)} %`, "0 %"], textStyle: { color: palette.soft },
        inRange: { color: [palette.paper, palette.lines[0]] },
      },
      tooltip: {
        ...base(palette).tooltip,
        formatter: (param) => {
          const line = param.data[1];
          const group = groups[line];
          const own = group.clients;
          const rows = [["", "10th percentile", number(own.p10)], ["", "mean", number(own.mean)], ["", "90th percentile", number(own.p90)], ["", "clients", String(total(group))]];
          if (param.seriesType === "heatmap") {
            const step = (high - low) / bins;
            rows.unshift(["", `${number(low + step * param.data[0], 2)} to ${number(low + step * (param.data[0] + 1), 2)}`, `${param.data[3]} clients`, true]);
          }
          return tip(group.label, rows);
        },
      },
      series: [
        { type: "heatmap", xAxisIndex: 0, data: cells, progressive: 0, itemStyle: { borderWidth: 0 } },
        mark("p10", "circle", "10th percentile", 8), mark("mean", "diamond", "mean", 13), mark("p90", "rect", "90th percentile", 8),
      ],
    }, "", 110 + 30 * Math.max(3, groups.length));
  }

  function drawMasks() {
    if (!byId("chart-masks")) return;
    const metric = byId("motion").value;
    draw(
      "chart-masks", curvesOption("chart-masks", metric, "round", { band: false, seeds: false, log: false }),
      `None of the settings that are shown has recorded ${metric}.`,
    );
  }

  const DRAWERS = [drawCurves, drawFront, drawBytes, drawLayers, drawClients, drawMasks];
  let turn = 0;
  // The first chart at once, each of the others in a turn of its own, so that the page answers meanwhile.
  function drawAll(done = () => {}) {
    turn += 1;
    const mine = turn;
    DRAWERS[0]();
    const next = (at) => {
      if (mine !== turn) return;
      if (at === DRAWERS.length) { done(); root.dataset.drawn = String(mine); return; }
      setTimeout(() => { if (mine === turn) { DRAWERS[at](); next(at + 1); } }, 0);
    };
    next(1);
  }

  // -- the keyboard ----------------------------------------------------------------------------------------------------

  function keys() {
    for (const place of document.querySelectorAll(".chart")) {
      let line = 0, at = -1;
      place.addEventListener("keydown", (event) => {
        const chart = charts.get(place.id);
        const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
        if (event.key === "Escape" && chart) { chart.dispatchAction({ type: "hideTip" }); at = -1; return; }
        const move = moves[event.key];
        if (!chart || !move || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        const { steps } = notes.get(place.id);
        // A chart of one row of things has only one way to go: both pairs of keys go it.
        const [down, right] = steps.length === 1 ? [0, move[0] + move[1]] : move;
        line = (Math.min(line, steps.length - 1) + down + steps.length) % steps.length;
        const step = steps[line];
        at = Math.max(0, Math.min(step.points.length - 1, at + right));
        const point = step.points[at];
        const series = chart.getOption().series;
        const seriesIndex = step.seriesIndex ?? series.findIndex((one) => one.name === step.name);
        pointer.y = Array.isArray(point) && step.seriesIndex === undefined ? chart.convertToPixel({ yAxisIndex: 0 }, point[1]) : null;
        chart.dispatchAction({ type: "showTip", seriesIndex, dataIndex: step.index ? step.index(point) : at });
        byId("says").textContent = step.say(point);
      });
      place.addEventListener("blur", () => { const chart = charts.get(place.id); if (chart) chart.dispatchAction({ type: "hideTip" }); });
    }
  }

  // -- theme and print -------------------------------------------------------------------------------------------------

  const THEMES = { system: "dark", dark: "light", light: "system" };
  function theme() {
    const button = byId("theme");
    const set = (name) => {
      if (name === "system") delete root.dataset.theme; else root.dataset.theme = name;
      button.textContent = `Theme: ${name}`;
      try { localStorage.setItem("fedray-theme", name); } catch { /* a page from a file may have no storage */ }
    };
    let chosen = "system";
    try { chosen = localStorage.getItem("fedray-theme") || "system"; } catch { /* as above */ }
    set(chosen in THEMES ? chosen : "system");
    button.hidden = false;
    button.addEventListener("click", () => { set(THEMES[root.dataset.theme || "system"]); repaint(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  }

  function repaint() {
    if (!data.groups.length) return;
    buildFacets();
    drawAll();
  }

  function printing() {
    const PAPER = 690; // pixels of the width of a printed page
    let before = null;
    addEventListener("beforeprint", () => {
      before = root.dataset.theme || "system";
      root.dataset.theme = "light";
      state.printing = true;
      for (const place of document.querySelectorAll(".chart:not(.empty)")) place.style.width = `${PAPER}px`;
      charts.forEach((chart) => chart.resize({ width: PAPER }));
      DRAWERS.forEach((one) => data.groups.length && one());
      // The browser may shrink or widen the page once more: pictures with a view box follow.
      for (const picture of document.querySelectorAll(".chart svg")) {
        picture.setAttribute("viewBox", `0 0 ${picture.clientWidth} ${picture.clientHeight}`);
      }
    });
    addEventListener("afterprint", () => {
      state.printing = false;
      if (before === "system") delete root.dataset.theme; else root.dataset.theme = before;
      for (const picture of document.querySelectorAll(".chart svg")) picture.removeAttribute("viewBox");
      for (const place of document.querySelectorAll(".chart")) place.style.width = "";
      charts.forEach((chart) => chart.resize({ width: "auto" }));
      DRAWERS.forEach((one) => data.groups.length && one());
    });
  }

  // -- start -----------------------------------------------------------------------------------------------------------

  function fill(id, options) {
    const place = byId(id);
    place.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  }

  function compare() {
    const table = byId("compare");
    const [one, other] = ["compare-a", "compare-b"].map((id) => data.groups[Number(byId(id).value)]);
    const names = [...new Set([...Object.keys(one.settings), ...Object.keys(other.settings)])];
    const rows = names.filter((name) => one.settings[name] !== other.settings[name]);
    const head = make("thead", {}, make("tr", {}, ...["setting", one.label, other.label].map((text) => make("th", { scope: "col" }, text))));
    const body = make("tbody");
    for (const name of rows) {
      body.append(make("tr", {}, make("th", { scope: "row" }, make("code", {}, name)), ...[one, other].map((group) => make("td", {}, group.settings[name] ?? "-"))));
    }
    if (!rows.length) body.append(make("tr", {}, make("td", { colspan: "3" }, "Nothing differs.")));
    table.replaceChildren(head, body);
  }

  function start() {
    root.classList.add("live");
    theme();
    if (!data.groups.length) { root.dataset.ready = "true"; return; }
    for (const place of document.querySelectorAll(".needs-script")) place.hidden = false;
    byId("method-name").textContent = data.methodAt < 0 ? "setting" : data.names[data.methodAt];
    buildFacets();
    fill("metric", data.metrics.map((name) => [name, name]));
    const has = (axis) => data.groups.some((group) => group.grids.some((grid) => grid[AXIS_AT[axis]]));
    for (const option of [...byId("across").options]) if (!has(option.value)) option.remove();
    for (const option of [...byId("cost").options]) if (!data.groups.some((group) => group.cost[option.value] !== undefined)) option.remove();
    fill("layer-group", data.groups.map((group, at) => [at, group.label]).filter(([at]) => data.groups[at].layers));
    if (byId("motion")) fill("motion", data.motion.map((name) => [name, name]));
    // The first layers to see are those of masks that change most.
    const moving = data.groups.map((group, at) => [at, group.layers ? Math.max(...group.layers.values.map((runs) => runs.length)) : 0]);
    const liveliest = moving.reduce((one, other) => (other[1] > one[1] ? other : one), [0, 0]);
    if (liveliest[1]) byId("layer-group").value = String(liveliest[0]);
    for (const id of ["metric", "across", "log", "band", "seeds"]) byId(id).addEventListener("change", drawCurves);
    for (const id of ["cost", "front-when", "front-log"]) byId(id).addEventListener("change", drawFront);
    byId("layer-group").addEventListener("change", drawLayers);
    if (byId("motion")) byId("motion").addEventListener("change", drawMasks);
    for (const button of document.querySelectorAll("[data-lines]")) {
      button.addEventListener("click", () => { state.lines = button.dataset.lines; changed(); });
    }
    byId("reset").addEventListener("click", () => { state.off.forEach((set) => set.clear()); buildFacets(); changed(); });
    if (byId("compare-a")) {
      for (const id of ["compare-a", "compare-b"]) {
        fill(id, data.groups.map((group, at) => [at, group.label]));
        byId(id).addEventListener("change", compare);
      }
      byId("compare-b").value = String(Math.min(1, data.groups.length - 1));
      compare();
    }
    sortable();
    keys();
    printing();
    let waiting = null;
    addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => charts.forEach((chart) => chart.resize()), 120);
    });
    changed();
    root.dataset.ready = "true";
  }

  start();
})();
