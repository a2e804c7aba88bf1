// Draws the charts of a sweep, on its page and in a report.
"use strict";

/** Return a function that shows charts in an element, instead of those that it has. */
function chartsIn(area) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let latest = [];
  let drawn = [];

  const fill = ({ caption, canvas }, chart, isAnother) => {
    const usual = { backgroundColor: "transparent", animation: false, aria: { enabled: true } };
    caption.textContent = `${chart.title}. ${chart.about}`;
    canvas.setOption({ ...usual, ...chart.option }, isAnother ? { notMerge: true } : { replaceMerge: ["series"] });
  };
  const draw = () => {
    drawn.forEach(({ canvas }) => canvas.dispose());
    area.replaceChildren();
    drawn = latest.map((chart) => {
      const figure = document.createElement("figure");
      figure.className = chart.wide ? "chart wide" : "chart";
      const caption = document.createElement("figcaption");
      const place = document.createElement("div");
      figure.append(caption, place);
      area.append(figure);
      return { caption, canvas: echarts.init(place, dark.matches ? "dark" : null) };
    });
    latest.forEach((chart, number) => fill(drawn[number], chart, true));
  };
  dark.addEventListener("change", draw);
  addEventListener("resize", () => drawn.forEach(({ canvas }) => canvas.resize()));
  return (charts, areOthers) => {
    latest = charts;
    if (charts.length !== drawn.length) draw();
    else charts.forEach((chart, number) => fill(drawn[number], chart, areOthers));
  };
}
