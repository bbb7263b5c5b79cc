"use strict";
(() => {
  const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const plain = { displayModeBar: false, responsive: true };
  const tools = { displayModeBar: true, displaylogo: false, responsive: true,
    modeBarButtonsToRemove: ["zoomIn2d", "zoomOut2d", "sendDataToCloud"] };
  const drawings = [];

  function axis(extra) {
    return Object.assign({ gridcolor: colourOf("--line"), zeroline: false, linecolor: colourOf("--line"),
      tickfont: { size: 11 }, automargin: true }, extra);
  }
  function frame(extra) {
    return Object.assign({ paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colourOf("--ink"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 48, r: 12, t: 26, b: 42 }, hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colourOf("--soft"), activecolor: colourOf("--accent") },
      legend: { orientation: "h", y: 1.12, x: 0, font: { size: 11 } } }, extra);
  }
  function draw(id, make, config = plain) {
    if (!document.getElementById(id)) return;
    const again = () => { const [traces, layout] = make(); Plotly.react(id, traces, layout, config); };
    drawings.push(again);
    again();
  }
  function decode(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  if (DATA.fsc) {
    draw("plot-fsc", () => {
      const traces = DATA.fsc.curves.map((curve) => ({ x: curve.x, y: curve.y, name: curve.name, mode: "lines",
        line: { color: curve.colour, width: 2 }, hovertemplate: "%{y:.3f} at 1/%{customdata:.2f} Å<extra></extra>",
        customdata: curve.x.map((f) => 1 / f) }));
      const end = Math.max(...DATA.fsc.curves.flatMap((curve) => curve.x));
      const line = (level) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level,
        line: { color: colourOf("--soft"), width: 1, dash: "dash" } });
      const shapes = [line(0.143), line(0.5)];
      const annotations = [0.143, 0.5].map((level) => ({ xref: "paper", x: 1, y: level, text: String(level),
        showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 10, color: colourOf("--soft") } }));
      const at = DATA.fsc.resolution_a;
      if (at) {
        shapes.push({ type: "line", x0: 1 / at, x1: 1 / at, y0: -0.1, y1: 1.05,
          line: { color: colourOf("--accent"), width: 1 } });
        annotations.push({ x: 1 / at, y: 1, text: ` ${at.toPrecision(3)} Å`, showarrow: false, xanchor: "left",
          font: { color: colourOf("--accent") } });
      }
      const ticks = [1, 2, 3, 4, 5].map((i) => (end * i) / 5);
      return [traces, frame({ shapes, annotations,
        xaxis: axis({ title: { text: "resolution (Å)" }, range: [0, end * 1.02], tickvals: ticks,
          ticktext: ticks.map((f) => (1 / f).toPrecision(3)) }),
        yaxis: axis({ title: { text: "FSC" }, range: [-0.1, 1.05] }) })];
    });
  }

  const lossColours = ["#1f6feb", "#e0701a"];
  function lossPlot(id, curves, title) {
    draw(id, () => [curves.map((curve, i) => ({ x: curve.x, y: curve.y, name: curve.name, mode: "lines+markers",
      line: { color: lossColours[i], width: 2 }, marker: { size: 5 } })),
    frame({ xaxis: axis({ title: { text: DATA.loss.step } }), yaxis: axis({ title: { text: title } }) })]);
  }
  if (DATA.loss) {
    lossPlot("plot-reconstruction", DATA.loss.reconstruction, "reconstruction loss");
    lossPlot("plot-kld", DATA.loss.kld, "KL divergence per particle");
  }

  if (DATA.contrast) {
    draw("plot-contrast", () => [[{ type: "bar", x: DATA.contrast.middles, y: DATA.contrast.counts,
      marker: { color: lossColours[0] }, hovertemplate: "%{y} particles at %{x:.3f}<extra></extra>" }],
    frame({ bargap: 0, xaxis: axis({ title: { text: "contrast (1: that of the mean map)" } }),
      yaxis: axis({ title: { text: "particles" } }) })]);
  }

  function nameOf(column) {
    const variance = DATA.latent.variance;
    if (column.startsWith("pc_")) {
      const share = variance[Number(column.slice(3)) - 1];
      return `PC ${column.slice(3)}` + (share === undefined ? "" : ` (${(100 * share).toFixed(0)} %)`);
    }
    if (column.startsWith("umap_")) return `UMAP ${column.slice(5)}`;
    return { cluster: "cluster", junk_score: "outlier score", loss: "reconstruction loss", norm: "|z|",
      log_evidence: "log evidence", contrast: "contrast" }[column] || column;
  }
  function within(values, share) {
    const sorted = Float32Array.from(values).filter(Number.isFinite).sort();
    return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  }

  if (DATA.latent) {
    const latent = DATA.latent;
    const columns = Object.fromEntries(Object.entries(latent.columns).map(([name, text]) => [name, decode(text)]));
    const first = latent.axes[0], second = latent.axes[1] || latent.axes[0];
    const hasUmap = latent.axes.includes("umap_1");
    const shown = columns.cluster.length;
    const size = shown < 1500 ? 6 : shown < 15000 ? 3.5 : 2.2;

    function marker(by, bar) {
      const values = columns[by];
      if (by === "cluster") {
        const n = latent.colours.length;
        const scale = n === 1 ? [[0, latent.colours[0]], [1, latent.colours[0]]]
          : latent.colours.map((colour, i) => [i / (n - 1), colour]);
        return { color: values, colorscale: scale, cmin: 0, cmax: Math.max(n - 1, 1), size, opacity: 0.75 };
      }
      const low = by === "junk_score" ? 0 : within(values, 0.01);
      const high = by === "junk_score" ? 2 * latent.junk_threshold : within(values, 0.99);
      return { color: values, colorscale: by === "junk_score" ? "YlOrRd" : "Viridis",
        reversescale: by === "junk_score" ? true : undefined, cmin: low, cmax: high, size, opacity: 0.75,
        showscale: bar, colorbar: { thickness: 10, len: 0.8, title: { text: nameOf(by), side: "right" } } };
    }
    // Posterior ellipses: covariances come as lower triangles, axes as directions in z.
    const spread = latent.uncertainty;
    if (spread && spread.particles) spread.particles = decode(spread.particles);
    function inPlane(packed, start, x, y) {
      const a = spread.rows[x], b = spread.rows[y];
      let xx = 0, xy = 0, yy = 0, at = start;
      for (let j = 0; j < a.length; j++) {
        for (let k = 0; k <= j; k++, at++) {
          const c = packed[at] * (j === k ? 0.5 : 1);
          xx += 2 * c * a[j] * a[k]; yy += 2 * c * b[j] * b[k]; xy += c * (a[j] * b[k] + a[k] * b[j]);
        }
      }
      return [xx, xy, yy];
    }
    function outline([x0, y0], [xx, xy, yy], look) {
      const sx = Math.sqrt(Math.max(xx, 0)), slant = sx > 0 ? xy / sx : 0;
      const rest = Math.sqrt(Math.max(yy - slant * slant, 0));
      const corners = Array.from({ length: 48 }, (_, i) => {
        const c = Math.cos(Math.PI * i / 24), s = Math.sin(Math.PI * i / 24);
        return `${x0 + sx * c},${y0 + slant * c + rest * s}`;
      });
      return { type: "path", path: `M${corners.join("L")}Z`, ...look };
    }
    function ellipses(x, y, [[left, right], [bottom, top]], hovered) {
      if (!spread || !spread.rows[x] || !spread.rows[y]) return { shapes: [], annotations: [] };
      const thin = { line: { color: colourOf("--ink"), width: 0.8 }, opacity: 0.7 };
      const shapes = spread.centers.map((packed, i) => outline([latent.centers[x][i], latent.centers[y][i]],
        inPlane(packed, 0, x, y), thin));
      const typical = inPlane(spread.typical, 0, x, y);
      const sx = Math.sqrt(typical[0]), sy = Math.sqrt(typical[2]);
      const corner = [left + 0.02 * (right - left) + sx, bottom + 0.02 * (top - bottom) + sy];
      shapes.push(outline(corner, typical, { line: { color: colourOf("--ink"), width: 1 },
        fillcolor: colourOf("--soft"), opacity: 0.8 }));
      if (hovered !== undefined) {
        const place = [columns[x][hovered], columns[y][hovered]];
        shapes.push(outline(place, inPlane(spread.particles, hovered * spread.typical.length, x, y),
          { line: { color: colourOf("--bad"), width: 2 } }));
      }
      const annotations = [{ x: corner[0] + sx, y: corner[1], text: "±1σ of a particle", showarrow: false,
        xanchor: "left", font: { size: 10, color: colourOf("--ink") }, bgcolor: colourOf("--paper"), opacity: 0.85 }];
      return { shapes, annotations };
    }
    function followEllipses(id, axes) {
      const plot = document.getElementById(id);
      if (!plot || !spread) return;
      const redraw = (hovered) => {
        const ranges = [plot.layout.xaxis.range, plot.layout.yaxis.range];
        Plotly.relayout(id, ellipses(...axes(), ranges, hovered));
      };
      plot.on("plotly_relayout", (change) => {
        if (Object.keys(change).some((key) => key.includes("axis"))) redraw();
      });
      if (!spread.particles) return;
      plot.on("plotly_hover", ({ points: [point] }) => { if (point.curveNumber === 0) redraw(point.pointNumber); });
      plot.on("plotly_unhover", () => redraw());
    }
    const webgl = Boolean(document.createElement("canvas").getContext("webgl"));
    function scatter(x, y, by, bar, drag) {
      const hoverable = spread && spread.particles && spread.rows[x] && spread.rows[y];
      const points = { type: webgl ? "scattergl" : "scatter", mode: "markers", x: columns[x], y: columns[y], marker: marker(by, bar),
        hoverinfo: hoverable ? "none" : "skip", showlegend: false, unselected: { marker: { opacity: 0.12 } } };
      const centres = { type: points.type, mode: "markers+text", x: latent.centers[x], y: latent.centers[y],
        text: latent.sizes.map((_, i) => String(i)), textfont: { size: 9, color: "#1c2730" }, showlegend: false,
        marker: { size: 15, color: "rgba(255,255,255,0.88)", line: { color: "#1c2730", width: 1 } },
        customdata: latent.sizes, hovertemplate: "cluster %{text}: %{customdata} particles<extra></extra>",
        selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 1 } } };
      const ranges = [latent.ranges[x], latent.ranges[y]];
      return [[points, centres], frame({ ...ellipses(x, y, ranges), dragmode: drag, margin: { l: 48, r: 12, t: 28, b: 42 },
        xaxis: axis({ title: { text: nameOf(x) }, range: latent.ranges[x] }),
        yaxis: axis({ title: { text: nameOf(y) }, range: latent.ranges[y] }) })];
    }
    const across = hasUmap ? ["umap_1", "umap_2"] : [first, second];
    draw("plot-glance", () => scatter(across[0], across[1], "cluster", false, "pan"));
    followEllipses("plot-glance", () => across);

    const pick = (id) => document.getElementById(id);
    const fill = (id, names, chosen) => names.forEach((name) => pick(id).add(
      new Option(nameOf(name), name, false, name === chosen)));
    fill("colour", ["cluster", "junk_score", "loss", "log_evidence", "contrast", "norm"].filter((name) => columns[name]), "cluster");
    fill("x1", latent.axes, first); fill("y1", latent.axes, second);
    fill("x2", latent.axes, across[0]); fill("y2", latent.axes, across[1]);
    if (!hasUmap && latent.axes.length > 2) pick("y2").value = latent.axes[2];
    draw("plot-left", () => scatter(pick("x1").value, pick("y1").value, pick("colour").value, false, "lasso"), tools);
    draw("plot-right", () => scatter(pick("x2").value, pick("y2").value, pick("colour").value, true, "lasso"), tools);
    followEllipses("plot-left", () => [pick("x1").value, pick("y1").value]);
    followEllipses("plot-right", () => [pick("x2").value, pick("y2").value]);
    document.querySelectorAll(".controls select").forEach((box) => box.addEventListener("change", () => {
      drawings.forEach((again) => again());
    }));

    const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
    function command(x, y, selection) {
      const round = (value) => Number(value.toPrecision(5));
      let corners;
      if (selection.lassoPoints) {
        corners = selection.lassoPoints.x.map((value, i) => [value, selection.lassoPoints.y[i]]);
        const step = Math.ceil(corners.length / 80);
        corners = corners.filter((_, i) => i % step === 0);
      } else {
        const [x0, x1] = selection.range.x, [y0, y1] = selection.range.y;
        corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
      }
      const outline = corners.map(([a, b]) => `${round(a)},${round(b)}`).join(" ");
      return `cryodrgn-pipeline select ${quoted(latent.run)} --outline '${x},${y}:${outline}' -o part.txt`;
    }
    [["plot-left", "x1", "y1"], ["plot-right", "x2", "y2"]].forEach(([id, x, y]) => {
      pick(id).on("plotly_selected", (event) => {
        if (!event || !(event.lassoPoints || event.range)) return;
        const inside = event.points.filter((point) => point.curveNumber === 0).length;
        const text = command(pick(x).value, pick(y).value, event);
        const box = pick("chosen");
        box.replaceChildren();
        const words = document.createElement("p");
        words.textContent = `${inside.toLocaleString("en")} of the ${shown.toLocaleString("en")} drawn particles `
          + `(${(100 * inside / shown).toFixed(1)} %) lie inside. This writes the ids of all that do: `;
        const copy = document.createElement("button");
        copy.textContent = "copy";
        copy.addEventListener("click", () => navigator.clipboard && navigator.clipboard.writeText(text));
        words.append(copy);
        const shell = document.createElement("pre");
        shell.textContent = text;
        box.append(words, shell);
      });
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawings.forEach((again) => again()));
})();
