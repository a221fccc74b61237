// @ts-check
// Every text of the page, in two languages, and numbers and times as each writes them.

import { useEffect, useReducer } from "./vendor/preact-htm.js";
import enA from "./i18n/en/a.js";
import enB from "./i18n/en/b.js";
import zhA from "./i18n/zh/a.js";
import zhB from "./i18n/zh/b.js";

/** @typedef {"en"|"zh"} Language */

const PLACE = "lmarena_proxy.language";
/** @type {Record<Language, Record<string, string>>} */
const DICTIONARIES = { en: { ...enA, ...enB }, zh: { ...zhA, ...zhB } };
const LOCALES = { en: "en", zh: "zh-CN" };
export const NONE = "–";

/** @type {Set<() => void>} */
const listeners = new Set();
/** @type {Language} */
let language = "en";
/** @type {Map<string, any>} */
const formats = new Map();

/** @returns {Language} */
function preferred() {
  let kept = null;
  try {
    kept = localStorage.getItem(PLACE);
  } catch {
    // Nothing is kept in this browser.
  }
  if (kept === "en" || kept === "zh") return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** @param {Language} next @param {boolean} [keep] */
export function setLanguage(next, keep = true) {
  language = next;
  formats.clear();
  document.documentElement.lang = LOCALES[next];
  try {
    if (keep) localStorage.setItem(PLACE, next);
  } catch {
    // As above.
  }
  listeners.forEach((listener) => listener());
}

/** @returns {Language} */
export const getLanguage = () => language;

/** The language, and a render when it changes. @returns {[Language, (next: Language) => void]} */
export function useLanguage() {
  const [, render] = useReducer((/** @type {number} */ count) => count + 1, 0);
  useEffect(() => {
    const listener = () => render(undefined);
    listeners.add(listener);
    return () => void listeners.delete(listener);
  }, []);
  return [language, setLanguage];
}

/**
 * The text of a key. `{name}` is replaced by the variable (numbers in the language's writing), and `{name:one|many}`
 * by the form that its number asks for.
 * @param {string} key
 * @param {Record<string, string|number>} [variables]
 * @returns {string}
 */
export function t(key, variables) {
  const text = DICTIONARIES[language][key] ?? DICTIONARIES.en[key] ?? key;
  if (!variables) return text;
  return text.replace(/\{(\w+)(?::([^|}]*)\|([^}]*))?\}/g, (whole, name, one, many) => {
    const value = variables[name];
    if (value === undefined) return whole;
    if (one !== undefined) return value === 1 ? one : many;
    return typeof value === "number" ? formatNumber(value) : value;
  });
}

/** Whether a key has a text: for words that come from the program, which may learn new ones. @param {string} key */
export const hasText = (key) => key in DICTIONARIES.en;

/** @template T @param {string} key @param {() => T} make @returns {T} */
function format(key, make) {
  if (!formats.has(key)) formats.set(key, make());
  return formats.get(key);
}

/** @param {number|null|undefined} value @param {number} [digits] at most, after the point */
export function formatNumber(value, digits = 0) {
  if (value == null || !Number.isFinite(value)) return NONE;
  return format(`n${digits}`, () => new Intl.NumberFormat(LOCALES[language], { maximumFractionDigits: digits })).format(value);
}

/** 12.3k, 1.2万 @param {number|null|undefined} value */
export function formatCompact(value) {
  if (value == null) return NONE;
  const options = /** @type {const} */ ({ notation: "compact", maximumFractionDigits: 1 });
  return format("compact", () => new Intl.NumberFormat(LOCALES[language], options)).format(value);
}

/** @param {number|null|undefined} share 0 to 1 */
export function formatPercent(share) {
  if (share == null || !Number.isFinite(share)) return NONE;
  const digits = share > 0 && share < 0.0995 ? 1 : 0;
  const options = /** @type {const} */ ({ style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits });
  return format(`p${digits}`, () => new Intl.NumberFormat(LOCALES[language], options)).format(share);
}

/** @param {number} value @param {"second"|"minute"|"hour"|"day"} unit @param {number} [digits] fixed, after the point */
function formatUnit(value, unit, digits = 0) {
  return format(`u${unit}${digits}`, () => {
    return new Intl.NumberFormat(LOCALES[language], {
      style: "unit",
      unit,
      unitDisplay: language === "zh" ? "short" : "narrow",
      minimumFractionDigits: digits,
      maximumFractionDigits: digits,
    });
  }).format(value);
}

/** A duration: 0.42s, 8.1s, 42s, 3m 20s, 2h 5m, 3d 4h @param {number|null|undefined} seconds */
export function formatDuration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return NONE;
  const value = Math.max(0, seconds);
  if (Number.isInteger(value) && value < 60) return formatUnit(value, "second");
  if (value < 1) return formatUnit(value, "second", 2);
  if (value < 9.95) return formatUnit(value, "second", 1);
  if (value < 59.5) return formatUnit(value, "second");
  const whole = Math.round(value);
  const parts = /** @type {const} */ ([["day", 86400, "hour", 3600], ["hour", 3600, "minute", 60], ["minute", 60, "second", 1]]);
  const [large, size, small, part] = parts.find(([, least]) => whole >= least) ?? parts[2];
  const rest = Math.floor((whole % size) / part);
  return formatUnit(Math.floor(whole / size), large) + (rest ? " " + formatUnit(rest, small) : "");
}

/** The time of the day @param {number|null|undefined} at Unix seconds */
export function formatTime(at) {
  if (at == null) return NONE;
  const options = /** @type {const} */ ({ hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  return format("time", () => new Intl.DateTimeFormat(LOCALES[language], options)).format(at * 1000);
}

/** Date and time in full @param {number|null|undefined} at Unix seconds */
export function formatDateTime(at) {
  if (at == null) return NONE;
  const options = /** @type {const} */ ({ dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
  return format("datetime", () => new Intl.DateTimeFormat(LOCALES[language], options)).format(at * 1000);
}

/** How long ago @param {number|null|undefined} at Unix seconds */
export function formatAgo(at) {
  if (at == null) return NONE;
  const seconds = Math.max(0, Date.now() / 1000 - at);
  const units = /** @type {const} */ ([["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]]);
  const [unit, size] = units.find(([, size]) => seconds >= size) ?? units[3];
  const relative = () => new Intl.RelativeTimeFormat(LOCALES[language], { numeric: "always", style: "narrow" });
  return format("ago", relative).format(-Math.floor(seconds / size), unit);
}

setLanguage(preferred(), false);
