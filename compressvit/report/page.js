// Every figure holds a drawn chart and its description: here the description is drawn again, by Vega, to the width that there is and with
// values under the pointer. Without scripts the drawn charts stay. Colours are the page's own (currentColor), so a theme needs no redrawing.
"use strict";

const NARROW = 520; // pixels: below, legends go under a chart and panels below one another

function fit(description, natural, width) {
  const spec = structuredClone(description);
  const narrow = width < NARROW;
  if (narrow) {
    spec.config.legend = { ...spec.config.legend, orient: "bottom", columns: 2, labelLimit: width / 2 - 28 };
    limitLabels(spec, width / 3);
  }
  if (spec.facet) {
    spec.columns = narrow ? 1 : spec.columns;
    const legend = narrow ? 0 : Math.max(0, natural - (spec.spec.width + 60) * spec.columns);
    const most = Math.max(120, (width - legend) / spec.columns - 75);
    const stretches = (spec.usermeta || {}).fit === "fill";
    spec.spec.width = stretches ? most : Math.min(spec.spec.width, most);
  } else if ((spec.usermeta || {}).fit === "fill" || natural > width) {
    spec.autosize = { type: "fit-x", contains: "padding" };
    spec.width = width;
    if (narrow && (spec.usermeta || {}).height === "any") spec.height = Math.min(spec.height, Math.round(width * 0.66));
  }
  return spec;
}

function limitLabels(part, limit) {
  if (part === null || typeof part !== "object") return;
  if (part.labelLimit > limit) part.labelLimit = limit;
  for (const [key, inner] of Object.entries(part)) if (key !== "data" && key !== "datasets") limitLabels(inner, limit);
}

async function embed(spec) {
  const canvas = document.createElement("div");
  return [canvas, await vegaEmbed(canvas, spec, { mode: "vega-lite", ast: true, actions: false, renderer: "svg" })];
}

async function draw(figure) {
  const box = figure.querySelector(".chart");
  const width = Math.floor(box.clientWidth);
  if (figure.drawnWidth === width) return;
  figure.drawnWidth = width;
  figure.description ??= JSON.parse(figure.querySelector("script").textContent);
  figure.natural ??= Number(box.querySelector("svg").getAttribute("width"));
  const spec = fit(figure.description, figure.natural, width);
  let [canvas, drawn] = await embed(spec);
  if (spec.facet) {
    // what panels need for their labels is known only now
    const over = canvas.querySelector("svg").getAttribute("width") - width;
    if (over > 0 || (spec.usermeta || {}).fit === "fill") {
      drawn.finalize();
      spec.spec.width = Math.max(60, spec.spec.width - Math.ceil(over / spec.columns));
      [canvas, drawn] = await embed(spec);
    }
  }
  figure.view?.finalize();
  figure.view = drawn;
  box.replaceChildren(canvas);
  figure.dataset.state = "live";
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
const drawAll = () => figures.forEach(draw);
let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 150);
});
drawAll();
