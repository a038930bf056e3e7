// Package contracttest holds the answers of a running server against the wire
// contract. A test puts [Validator.Transport] around the transport of its
// client and goes on as before: every answer that breaks the contract fails the
// test and says how.
//
// It is for tests alone; no production package may import it.
package contracttest

import (
	"bytes"
	_ "embed"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
)

// Reference is the API reference page of OpenLock, with its five client
// snippets: what integrators have copied is what has to work.
//
//go:embed open-lock-reference.txt
var Reference string

// A Validator checks answers for one test and counts what it has seen. It may
// be shared by any number of clients and goroutines.
type Validator struct {
	t     testing.TB
	rules *rules

	mu   sync.Mutex
	seen map[string]int
}

// New returns a Validator that reports to t. The contract is compiled once in a
// process, so a Validator for each test is cheap.
func New(t testing.TB) *Validator {
	t.Helper()
	r, err := loadRules()
	if err != nil {
		t.Fatalf("contracttest: the contract does not load: %v", err)
	}
	return &Validator{t: t, rules: r, seen: make(map[string]int)}
}

// Seen counts the answers to routes of the contract by
// "METHOD /path-template STATUS", for example "POST /locks/{id}/OpenLock 200".
func (v *Validator) Seen() map[string]int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maps.Clone(v.seen)
}

// Transport lets every request through to next, wrong ones too, and checks what
// comes back. It never changes an answer, and the body stays readable. A nil
// next means [http.DefaultTransport].
func (v *Validator) Transport(next http.RoundTripper) http.RoundTripper {
	if next == nil {
		next = http.DefaultTransport
	}
	return roundTripper(func(req *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(req)
		if err == nil {
			v.check(req, resp)
		}
		return resp, err
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

func (v *Validator) check(req *http.Request, resp *http.Response) {
	v.t.Helper()
	route := v.rules.route(req)
	if route != nil {
		v.count(req.Method + " " + route.Path + " " + strconv.Itoa(resp.StatusCode))
	} else if resp.StatusCode < 400 || !isJSON(resp.Header) {
		return // and the body is left alone: it may be a stream without an end
	}
	if req.Method == http.MethodHead {
		return // headers that speak of a body which is not there
	}

	body, err := readAgain(resp)
	if err != nil {
		return // cut off on the way: the caller meets the same error
	}
	if wrong := v.rules.violations(req, resp, route, body); len(wrong) > 0 {
		v.t.Errorf("contract: %s %s answered %d:\n\t%s\nbody: %.500s",
			req.Method, req.URL.Path, resp.StatusCode, strings.Join(wrong, "\n\t"), body)
	}
}

func (v *Validator) count(answer string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.seen[answer]++
}

// readAgain reads the body of resp and puts another in its place that yields
// the same bytes and ends with the same error.
func readAgain(resp *http.Response) ([]byte, error) {
	body, err := io.ReadAll(resp.Body)
	again := io.Reader(bytes.NewReader(body))
	if err != nil {
		again = io.MultiReader(again, iotest.ErrReader(err))
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{again, resp.Body}
	return body, err
}
