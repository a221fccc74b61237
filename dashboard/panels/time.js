// @ts-check
/** Over time: requests, errors, queue and speed of the last hour or day, as charts and as tables. */

import { html, memo, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact-htm.js";
import uPlot from "../vendor/uPlot.esm.js";
import { t, useLanguage } from "../i18n.js";
import { store, useStore } from "../store.js";
import { Button, Empty, ErrorNote, ModelKind, Segments, SortHeader, Stat, cssColor, onThemeChange, sortBy, usePolled, useSort } from "../ui.js";
import { clock, locale, moment, number, span } from "./shared-b.js";

/**
 * @typedef {{median: (number|null)[], p95: (number|null)[]}} Spread
 * @typedef {{model_id: string, model: string, requests: number, errors: number,
 *   first_byte_seconds?: {median?: number|null, p95?: number|null}|null,
 *   tokens_per_second?: {median?: number|null, p95?: number|null}|null}} ModelRow
 * @typedef {{from: number, to: number, bucket_seconds: number, times: number[], requests: number[], errors: number[],
 *   queue_depth: number[], first_byte_seconds: Spread, tokens_per_second: Spread, models: ModelRow[]}} Statistics
 * @typedef {{name: string, values: (number|null)[], color: string, kind: "bars"|"line"|"area"}} Series
 */

const Plot = /** @type {any} */ (uPlot);
const SECONDS = { 1: 15, 24: 60 }; // how often each span is asked for again
/** @type {{hours: 1|24, asTable: Record<string, boolean>}} */
const kept = { hours: 1, asTable: {} };

const count = (/** @type {number|null|undefined} */ value) => number(value, 1);
const rate = (/** @type {number|null|undefined} */ value) => number(value, value != null && value < 10 ? 1 : 0);

/** A number that changes with the colours of the page. */
function useTheme() {
  const [turn, setTurn] = useState(0);
  useEffect(() => onThemeChange(() => setTurn((count) => count + 1)), []);
  return turn;
}

/** @param {number} seconds @param {boolean} isDay */
const bucketTime = (seconds, isDay) =>
  moment(seconds, isDay ? { weekday: "short", hour: "2-digit", minute: "2-digit", hourCycle: "h23" } : { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

/** The values without a neighbour: they are no line, but a point. @param {(number|null)[]} values */
const alone = (values) => [...values.keys()].filter((at) => values[at] != null && values[at - 1] == null && values[at + 1] == null);

/**
 * @param {Series[]} series
 * @param {HTMLElement} place
 * @param {(value: number|null|undefined) => string} format
 * @param {(index: number|null) => void} onCursor
 */
function options(series, place, format, onCursor) {
  const isCount = format === count;
  const color = cssColor;
  const font = `11px ${getComputedStyle(place).fontFamily}`;
  const axis = { stroke: color("--muted"), font, ticks: { show: false }, grid: { stroke: color("--line"), width: 1 } };
  const bars = Plot.paths.bars({ size: [0.7, 40], align: 1 });
  return {
    width: Math.max(120, place.clientWidth),
    height: place.clientHeight,
    padding: [8, 24, 0, 0], // to the right: half of a label
    legend: { show: false },
    cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
    scales: {
      // Times are where buckets begin: the newest one needs its own width.
      x: { time: true, range: (/** @type {any} */ { data: [times] }, /** @type {number} */ first, /** @type {number} */ last) => [first, last + times[1] - times[0]] },
      y: { range: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ top) => [0, top > 0 ? top * 1.08 : 1] },
    },
    axes: [
      {
        ...axis, grid: { show: false }, space: 56, size: 26, gap: 6,
        values: (/** @type {any} */ _, /** @type {number[]} */ splits) => splits.map((each) => moment(each, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })),
      },
      {
        ...axis, size: 52, incrs: isCount ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] : undefined,
        values: (/** @type {any} */ _, /** @type {number[]} */ splits) => splits.map((each) => (each === 0 ? "0" : format(each))),
      },
    ],
    series: [
      {},
      ...series.map((each) => ({
        label: each.name,
        stroke: color(each.color),
        fill: each.kind === "bars" ? color(each.color) : each.kind === "area" ? color(`${each.color}-soft`) : undefined,
        width: each.kind === "bars" ? 0 : 1.75,
        paths: each.kind === "bars" ? bars : undefined,
        points: {
          show: false, size: 6, fill: color(each.color),
          filter: each.kind === "bars" ? null : (/** @type {any} */ { data }, /** @type {number} */ number) => alone(data[number]),
        },
        spanGaps: false,
      })),
    ],
    hooks: { setCursor: [(/** @type {any} */ plot) => onCursor(plot.cursor.idx ?? null)] },
  };
}

/**
 * One chart with its legend, which also tells the values below the pointer; or the same as a table.
 * @type {(props: {name: string, times: number[], series: Series[], format: (value: number|null|undefined) => string, isDay: boolean}) => any}
 */
const Chart = memo(({ name, times, series, format, isDay }) => {
  const id = useId();
  const theme = useTheme();
  const language = locale();
  const place = useRef(/** @type {HTMLElement|null} */ (null));
  const plot = useRef(/** @type {any} */ (null));
  const [at, setAt] = useState(/** @type {number|null} */ (null));
  const [asTable, setAsTable] = useState(!!kept.asTable[name]);
  const data = useMemo(() => [times, ...series.map((each) => each.values)], [times, series]);

  useLayoutEffect(() => {
    const element = place.current;
    if (asTable || !element) return undefined;
    const made = new Plot(options(series, element, format, setAt), data, element);
    plot.current = made;
    const observer = new ResizeObserver(() => {
      if (element.clientWidth && element.clientWidth !== made.width) made.setSize({ width: element.clientWidth, height: element.clientHeight });
    });
    observer.observe(element);
    return () => {
      observer.disconnect();
      made.destroy();
      plot.current = null;
      setAt(null);
    };
  }, [asTable, theme, language, isDay]);
  useLayoutEffect(() => {
    if (plot.current && plot.current.data !== data) plot.current.setData(data);
  }, [data]);

  const index = at != null && at < times.length ? at : null;
  const switchTo = () => {
    kept.asTable[name] = !asTable;
    setAsTable(!asTable);
  };
  return html`<figure class="card b-chart" aria-labelledby=${`${id}-title`}>
    <figcaption class="card-head">
      <h2 id=${`${id}-title`}>${t(`b.chart.${name}`)}</h2>
      <${Button} small aria-pressed=${String(asTable)} onClick=${switchTo}
        aria-label=${`${t("b.time.as_table")}: ${t(`b.chart.${name}`)}`}>${t("b.time.as_table")}<//>
    </figcaption>
    ${asTable
      ? html`<div class="b-values" tabindex="0" role="region" aria-labelledby=${`${id}-title`}><table class="table">
          <thead><tr><th scope="col">${t("b.time.time")}</th>${series.map((each) => html`<th key=${each.name} scope="col" class="numeric">${each.name}</th>`)}</tr></thead>
          <tbody>${times.map((_, reversed) => {
            const row = times.length - 1 - reversed;
            return html`<tr key=${times[row]}><th scope="row">${bucketTime(times[row], isDay)}</th>
              ${series.map((each) => html`<td key=${each.name} class="numeric">${format(each.values[row])}</td>`)}</tr>`;
          })}</tbody></table></div>`
      : html`<div class="b-chart-legend" aria-hidden="true">
            ${series.map((each) => html`<span key=${each.name}><span class="b-swatch" style=${{ background: `var(${each.color})` }}></span>${each.name}${" "}
              <b>${index == null ? "" : format(each.values[index])}</b></span>`)}
            <span class="b-at">${index == null ? "" : bucketTime(times[index], isDay)}</span>
          </div>
          <div class="b-plot" ref=${place} role="img" aria-label=${summary(name, series, format)}></div>`}
  </figure>`;
});

/** @param {string} name @param {Series[]} series @param {(value: number|null|undefined) => string} format */
function summary(name, series, format) {
  const parts = series.map((each) => {
    const values = each.values.filter((value) => value != null);
    const most = values.length ? format(Math.max(.../** @type {number[]} */ (values))) : "–";
    return t("b.time.summary_series", { name: each.name, last: format(each.values.at(-1)), most });
  });
  return `${t(`b.chart.${name}`)}: ${parts.join("; ")}. ${t("b.time.summary_table")}`;
}

const MODEL_COLUMNS = /** @type {const} */ (["model", "requests", "errors", "first_byte", "first_byte_95", "rate", "rate_95"]);
/** @type {Record<string, (row: ModelRow) => string|number|null|undefined>} */
const VALUES = {
  model: (row) => row.model,
  requests: (row) => row.requests,
  errors: (row) => row.errors,
  first_byte: (row) => row.first_byte_seconds?.median,
  first_byte_95: (row) => row.first_byte_seconds?.p95,
  rate: (row) => row.tokens_per_second?.median,
  rate_95: (row) => row.tokens_per_second?.p95,
};

const Models = memo(
  /** @param {{models: ModelRow[], language: string}} props */
  ({ models }) => {
    const [sort, onSort] = useSort("requests", true);
    useStore((state) => state.pool.size); // it may come later than the numbers
    const { pool } = store.get();
    const rows = useMemo(() => sortBy(models, VALUES[sort.by], sort.descending), [models, sort]);
    return html`<section class="card" aria-labelledby="by-model-title">
      <div class="card-head"><h2 id="by-model-title">${t("b.time.by_model")}</h2></div>
      <div class="table-wrap b-scroll" tabindex="0" role="group" aria-labelledby="by-model-title"><table class="table">
        <thead><tr>${MODEL_COLUMNS.map((column) => html`<${SortHeader} key=${column} id=${column} label=${t(`b.time.column.${column}`)}
          numeric=${column !== "model"} sort=${sort} onSort=${onSort} />`)}</tr></thead>
        <tbody>${rows.map((row) => html`<tr key=${row.model_id}>
          <th scope="row">${row.model}${pool.has(row.model_id) && html`<${ModelKind} entry=${pool.get(row.model_id)} />`}</th><td class="numeric">${number(row.requests)}</td>
          <td class=${`numeric ${row.errors ? "b-error" : ""}`}>${number(row.errors)}</td>
          <td class="numeric">${span(row.first_byte_seconds?.median)}</td><td class="numeric">${span(row.first_byte_seconds?.p95)}</td>
          <td class="numeric">${number(row.tokens_per_second?.median, 1)}</td><td class="numeric">${number(row.tokens_per_second?.p95, 1)}</td>
        </tr>`)}</tbody>
      </table></div>
    </section>`;
  },
);

/** @param {number[]} values */
const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);

export default function OverTime() {
  const [language] = useLanguage();
  const [hours, setHours] = useState(kept.hours);
  const { data, error: problem, reload } = usePolled(`/api/statistics?hours=${hours}`, SECONDS[hours]);
  const statistics = /** @type {Statistics|null} */ (data);

  const isDay = hours === 24;
  const charts = useMemo(() => {
    if (!statistics) return [];
    const { first_byte_seconds: first, tokens_per_second: speed } = statistics;
    /** @type {(spread: Spread, color: string) => Series[]} */
    const both = (spread, color) => [
      { name: t("b.time.median"), values: spread.median, color, kind: "area" },
      { name: t("b.time.p95"), values: spread.p95, color: "--chart-2", kind: "line" },
    ];
    return [
      {
        name: "requests", format: count, series: /** @type {Series[]} */ ([
          { name: t("b.time.requests"), values: statistics.requests, color: "--chart-1", kind: "bars" },
          { name: t("b.time.errors"), values: statistics.errors, color: "--chart-4", kind: "bars" },
        ]),
      },
      { name: "queue", format: count, series: /** @type {Series[]} */ ([{ name: t("b.time.queue_most"), values: statistics.queue_depth, color: "--chart-3", kind: "area" }]) },
      { name: "first_byte", format: span, series: both(first, "--chart-1") },
      { name: "rate", format: rate, series: both(speed, "--chart-3") },
    ];
  }, [statistics, language]);

  const total = statistics ? sum(statistics.requests) : 0;
  const errors = statistics ? sum(statistics.errors) : 0;
  const deepest = statistics ? Math.max(0, ...statistics.queue_depth.map((value) => value ?? 0)) : 0;
  return html`<section class="page b-time" aria-labelledby="time-title">
    <div class="page-head">
      <h1 id="time-title">${t("b.time.title")}</h1>
      <${Segments} label=${t("b.time.span")} value=${String(hours)} options=${[["1", t("b.time.hours_1")], ["24", t("b.time.hours_24")]]}
        onChange=${(/** @type {string} */ value) => {
          kept.hours = value === "24" ? 24 : 1;
          setHours(kept.hours);
        }} />
    </div>
    ${problem && html`<${ErrorNote} error=${problem} onRetry=${reload} />`}
    ${!statistics && !problem && html`<div class="b-charts" aria-busy="true">${[0, 1, 2, 3].map((each) => html`<div key=${each} class="card b-chart b-hollow"></div>`)}</div>`}
    ${statistics && (total === 0 && deepest === 0
      ? html`<${Empty} icon="time" title=${t(`b.time.empty_${hours}`)} />`
      : html`<dl class="stats">
          <${Stat} label=${t("b.time.requests")} value=${number(total)} />
          <${Stat} label=${t("b.time.errors")} value=${number(errors)} hint=${total ? t("b.percent", { n: number((errors / total) * 100, 1) }) : ""} kind=${errors ? "bad" : ""} />
          <${Stat} label=${t("b.time.queue_most")} value=${number(deepest)} />
          <${Stat} label=${t("b.time.until")} value=${clock(Math.min(statistics.to, Date.now() / 1000))} />
        </dl>
        <div class="b-charts">${charts.map((chart) => html`<${Chart} key=${`${chart.name} ${hours}`} name=${chart.name} times=${statistics.times}
          series=${chart.series} format=${chart.format} isDay=${isDay} />`)}</div>
        ${statistics.models?.length > 0 && html`<${Models} models=${statistics.models} language=${language} />`}`)}
  </section>`;
}
