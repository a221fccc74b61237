// @ts-check
/**
 * The list of ended requests as the reader sees it: pages of the store, and what the feed says has ended since.
 * It outlives the panel, so that who comes back from one request finds the list as it was.
 */

import { call } from "../api.js";

/** @typedef {import("./shared-b.js").Summary} Summary @typedef {import("./shared-b.js").Running} Running */

export const PAGE = 50;
const MOST_ROWS = 400; // in the document at once

/** @typedef {{q: string, status: string, model: string}} Filters */

/**
 * The filters as a query.
 * @param {Filters} filters
 * @param {Record<string, string|number>} [rest]
 */
export function query(filters, rest = {}) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...rest, ...filters })) if (value !== "") given.set(name, String(value));
  return given.toString();
}

/** @param {Summary} request @param {string} status as the API's parameter */
function hasStatus(request, status) {
  if (!status) return true;
  if (status === "ok") return request.status === 200;
  if (status === "left") return request.status === 499;
  if (status === "failed") return request.status !== 200 && request.status !== 499;
  return String(request.status) === status;
}

/** @param {Running} request @param {Filters} filters */
export function isShownRunning(request, filters) {
  if (filters.status && filters.status !== "running") return false;
  if (filters.model && request.model !== filters.model) return false;
  const wanted = filters.q.trim().toLowerCase();
  return !wanted || [request.request_id, request.model, request.client, request.preview].some(
    (text) => text?.toLowerCase().includes(wanted),
  );
}

export class RequestList {
  constructor() {
    /** @type {Filters} */
    this.filters = { q: "", status: "", model: "" };
    /** @type {Summary[]} newest first */
    this.rows = [];
    /** @type {Summary[]} ended since, kept back while the reader is further down */
    this.fresh = [];
    /** @type {string|null} where the next older page begins */
    this.next = null;
    this.isLoading = false;
    this.isLoaded = false;
    this.isDetached = false; // the newest rows were dropped to make room for older ones
    this.isStale = false; // more has ended than the feed still knows
    /** @type {Error|null} */
    this.problem = null;
    this.scroll = 0;
    /** @type {Summary[]} what the feed says has ended, newest first */
    this.ended = [];
    /** @type {string|null} the newest of them that was looked at */
    this.seen = null;
    this.turn = 0;
    /** @type {() => void} */
    this.onChange = () => {};
  }

  /**
   * Begin again at the newest.
   * @param {Summary[]} ended as the feed has them now: what comes after them is taken from there
   */
  async reload(ended) {
    this.ended = ended;
    await this.load("");
  }

  /** Add the next page of older ones. */
  async older() {
    if (this.next && !this.isLoading) await this.load(this.next);
  }

  /** @param {string} before */
  async load(before) {
    const turn = ++this.turn;
    const filters = this.filters;
    this.isLoading = true;
    this.problem = null;
    this.onChange();
    try {
      /** @type {{data: Summary[], next: string|null}} */
      const page = filters.status === "running"
        ? { data: [], next: null }
        : await call("GET", `/api/requests?${query(filters, { limit: PAGE, before })}`);
      if (turn !== this.turn) return;
      if (before) {
        const known = new Set(this.rows.map((row) => row.request_id));
        this.rows = [...this.rows, ...page.data.filter((row) => !known.has(row.request_id))];
        if (this.rows.length > MOST_ROWS) {
          this.rows = this.rows.slice(-MOST_ROWS);
          this.isDetached = true;
        }
      } else {
        this.rows = page.data;
        this.isDetached = this.isStale = false;
        // What has just ended may be in the feed before it is in the store.
        this.fresh = filters.q ? [] : this.fitting(this.ended);
        this.seen = this.ended[0]?.request_id ?? null;
        this.next = page.next ?? null;
        this.merge();
      }
      if (before) this.next = page.next ?? null;
      this.isLoaded = true;
    } catch (error) {
      if (turn !== this.turn) return;
      this.problem = /** @type {Error} */ (error);
    }
    this.isLoading = false;
    this.onChange();
  }

  /**
   * Take in what the feed says has ended.
   * @param {Summary[]} ended newest first
   * @param {boolean} mayFlow whether rows may appear above those that are read
   */
  take(ended, mayFlow) {
    this.ended = ended;
    if (!this.isLoaded || !ended.length || ended[0].request_id === this.seen) return;
    const end = this.seen == null ? ended.length : ended.findIndex((row) => row.request_id === this.seen);
    this.seen = ended[0].request_id;
    const { filters } = this;
    if (filters.status === "running") return;
    if (end < 0) this.isStale = true;
    const known = new Set(this.fresh.map((row) => row.request_id));
    const news = this.fitting(ended.slice(0, end < 0 ? ended.length : end)).filter((row) => !known.has(row.request_id));
    // A search is the store's: it sees the whole texts. So with one they are only announced.
    if (news.length) this.fresh = [...news, ...this.fresh].slice(0, MOST_ROWS);
    if (mayFlow && !this.needsReload) this.show();
    else if (news.length || this.isStale) this.onChange();
  }

  /** Whether the new ones can only be had by asking the store again. */
  get needsReload() {
    return this.isDetached || this.isStale || this.filters.q !== "";
  }

  /**
   * Those that the filters want and the list has not got yet.
   * @param {Summary[]} ended
   */
  fitting(ended) {
    const { status, model } = this.filters;
    if (status === "running") return [];
    const known = new Set(this.rows.map((row) => row.request_id));
    return ended.filter((row) => !known.has(row.request_id) && hasStatus(row, status) && (!model || row.model === model));
  }

  /** Put what was kept back into the list. */
  show() {
    if (!this.fresh.length) return;
    this.merge();
    this.onChange();
  }

  merge() {
    if (!this.fresh.length) return;
    const oldest = this.next ? this.rows.at(-1)?.created_at ?? 0 : 0;
    const rows = [...this.fresh.filter((row) => row.created_at >= oldest), ...this.rows];
    this.rows = rows.sort((one, other) => other.created_at - one.created_at);
    this.fresh = [];
    if (this.rows.length > MOST_ROWS) {
      this.rows = this.rows.slice(0, MOST_ROWS);
      this.next = this.rows[MOST_ROWS - 1].request_id;
    }
  }
}
