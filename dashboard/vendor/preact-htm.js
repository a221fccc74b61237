// @ts-check
// Preact, its hooks and htm as one import: html`<div class="card">${text}</div>` makes Preact nodes.
// The minified modules carry no types: they are said here.
import htm from "./htm.module.js";
import * as hooks from "./preact-hooks.module.js";
import * as preact from "./preact.module.js";

const { Fragment, createContext, createRef, h } = preact;
/** @type {(node: any, parent: Element) => void} */
const render = preact.render;

export { Fragment, createContext, createRef, h, render };

/** @type {new (props?: any) => {props: any, state: any, setState(some: any): void}} */
export const Component = /** @type {any} */ (preact.Component);
/** @type {<T>(initial: T | (() => T)) => [T, (next: T | ((now: T) => T)) => void]} */
export const useState = hooks.useState;
/** @type {<S, A>(reduce: (state: S, action: A) => S, initial: S) => [S, (action: A) => void]} */
export const useReducer = hooks.useReducer;
/** @type {(effect: () => void | (() => void), inputs?: readonly any[]) => void} */
export const useEffect = hooks.useEffect;
/** @type {(effect: () => void | (() => void), inputs?: readonly any[]) => void} */
export const useLayoutEffect = hooks.useLayoutEffect;
/** @type {<T>(make: () => T, inputs: readonly any[]) => T} */
export const useMemo = hooks.useMemo;
/** @type {<F extends (...args: any[]) => any>(callback: F, inputs: readonly any[]) => F} */
export const useCallback = hooks.useCallback;
/** @type {<T>(initial: T) => {current: T}} */
export const useRef = hooks.useRef;
/** @type {() => string} */
export const useId = hooks.useId;
/** @type {(context: any) => any} */
export const useContext = hooks.useContext;

/** @type {(strings: TemplateStringsArray, ...values: any[]) => any} */
export const html = htm.bind(h);

/**
 * A component that renders again only when one of its properties is another value (Object.is).
 * @template {Record<string, any>} P
 * @param {(props: P) => any} component
 * @returns {(props: P) => any}
 */
export function memo(component) {
  /** @this {any} @param {P} next */
  function differs(next) {
    const now = this.props;
    for (const name in next) if (!Object.is(next[name], now[name])) return true;
    for (const name in now) if (!(name in next)) return true;
    return false;
  }
  /** @this {any} @param {P} props */
  function Memo(props) {
    this.shouldComponentUpdate = differs;
    return h(component, props); // a node of its own, so that the hooks inside it still make it render
  }
  return Memo;
}
