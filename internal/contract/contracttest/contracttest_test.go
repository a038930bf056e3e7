package contracttest_test

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/openlock/openlock/internal/contract/contracttest"
)

const (
	opened = `{"success":true,"aggregateId":"123","version":4,"event":{"type":"LockOpenRequested","data":` +
		`{"lockId":123,"uuid":"u","timestamp":"2026-05-29T12:00:00.000Z"}},"commandId":"beside the event"}`
	jsonType = "application/json"
)

// errorBody is the one error body for a status.
func errorBody(status int) string {
	return fmt.Sprintf(`{"success":false,"error":"Name","message":"What to do.","code":%[1]d,`+
		`"errors":[{"code":%[1]d,"message":"What to do."}]}`, status)
}

// history is a page of events that holds one event.
func history(eventType, payload string) string {
	return `{"aggregateId":"1","totalEvents":1,"page":1,"pageSize":10,"totalPages":1,"events":[{"aggregateType":"lock",` +
		`"aggregateId":"1","version":1,"type":"` + eventType + `","timestamp":"t","orgId":"","event":` + payload + `}]}`
}

// An answer is what the hand-made server says to one request.
type answer struct {
	name        string
	request     string // "METHOD /path"
	status      int
	contentType string
	body        string
	want        string // a part of the complaint; none is wanted when empty
}

var goodAnswers = []answer{
	{name: "event", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType, body: opened},
	{name: "charset", request: "POST /locks/123/OpenLock", status: 200, contentType: "application/json; charset=utf-8", body: opened},
	{name: "nothing changed", request: "POST /locks/123/CreateLock", status: 200, contentType: jsonType,
		body: `{"success":true,"aggregateId":"123","version":1,"event":null}`},
	{name: "documented error", request: "POST /locks/123/OpenLock", status: 502, contentType: jsonType, body: errorBody(502)},
	{name: "error without a schema", request: "POST /locks/123/OpenLock", status: 401, contentType: jsonType, body: errorBody(401)},
	{name: "unlisted error", request: "POST /locks/x/OpenLock", status: 400, contentType: jsonType, body: errorBody(400)},
	{name: "redirect", request: "POST /temp-keys/u/open", status: 303},
	{name: "deleted", request: "DELETE /temp-keys/u", status: 200},
	{name: "page", request: "GET /temp-keys/u", status: 404, contentType: "text/html; charset=utf-8", body: "<p>gone"},
	{name: "page, unlisted error", request: "GET /temp-keys/u", status: 429, contentType: "text/html", body: "<p>later"},
	{name: "history", request: "GET /locks/1/events", status: 200, contentType: jsonType,
		body: history("OwnerSet", `{"lockId":1,"uuid":"u","timestamp":"t","userId":"x"}`)},
	{name: "outcome in history", request: "GET /locks/1/events", status: 200, contentType: jsonType,
		body: history("LockOpened", `{"anything":true}`)},
	{name: "no JSON outside the contract", request: "GET /metrics", status: 503, contentType: "text/plain", body: "later"},
	{name: "fine outside the contract", request: "GET /healthz", status: 200, contentType: jsonType, body: `{"anything":1}`},
	{name: "error outside the contract", request: "GET /nowhere", status: 404, contentType: jsonType, body: errorBody(404)},
	{name: "headers only", request: "HEAD /locks/1/details", status: 404, contentType: jsonType},
}

var wrongAnswers = []answer{
	{name: "field missing", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType,
		body: strings.Replace(opened, `"version":4,`, "", 1), want: "body: missing property 'version'"},
	{name: "field of another type", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType,
		body: strings.Replace(opened, `"123"`, `123`, 1), want: "body.aggregateId: got number, want string"},
	{name: "not JSON", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType, body: opened[1:], want: "cannot be decoded"},
	{name: "no body", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType, want: "empty or null"},
	{name: "null", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType, body: "null", want: "empty or null"},
	{name: "content type", request: "POST /locks/123/OpenLock", status: 200, contentType: "text/plain", body: opened, want: "text/plain"},
	{name: "no content type", request: "POST /locks/123/OpenLock", status: 200, body: opened, want: "content type"},
	{name: "unlisted success", request: "POST /locks/123/OpenLock", status: 202, contentType: jsonType, body: opened, want: "does not list this status"},
	{name: "unlisted redirect", request: "POST /locks/123/OpenLock", status: 307, want: "does not list this status"},
	{name: "unknown field in the payload", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType,
		body: strings.Replace(opened, `"uuid"`, `"actor":"a","uuid"`, 1), want: "event.data of LockOpenRequested: at '': additional properties 'actor' not allowed"},
	{name: "outcome in a command's answer", request: "POST /locks/123/OpenLock", status: 200, contentType: jsonType,
		body: strings.Replace(opened, "LockOpenRequested", "LockOpened", 1), want: "LockOpened is not an event type that may stand here"},
	{name: "unknown type in history", request: "GET /locks/1/events", status: 200, contentType: jsonType,
		body: history("Surprise", `{}`), want: "events[0].event: Surprise is not an event type"},
	{name: "unknown field in history", request: "GET /locks/1/events", status: 200, contentType: jsonType,
		body: history("OwnerSet", `{"lockId":1,"uuid":"u","timestamp":"t","userId":"x","by":"y"}`), want: "additional properties 'by' not allowed"},
	{name: "documented error without the one body", request: "POST /locks/123/OpenLock", status: 502, contentType: jsonType,
		body: `{"success":false,"error":"Error","message":"m"}`, want: "missing properties 'code', 'errors'"},
	{name: "error with another enum", request: "POST /locks/1/open-with-pin", status: 401, contentType: jsonType,
		body: errorBody(401), want: "body.error: value must be 'Invalid PIN'"},
	{name: "error without a schema, empty", request: "POST /locks/123/OpenLock", status: 403, want: "an error must be application/json"},
	{name: "unlisted error as text", request: "POST /locks/123/OpenLock", status: 413, contentType: "text/plain", body: "too large",
		want: `an error must be application/json, not "text/plain"`},
	{name: "page with JSON of its own", request: "GET /temp-keys/u", status: 429, contentType: jsonType, body: `{}`, want: "missing properties"},
	{name: "error that is not JSON", request: "POST /locks/123/OpenLock", status: 400, contentType: jsonType, body: "bad", want: "the error body is not JSON"},
	{name: "error that claims success", request: "POST /locks/123/OpenLock", status: 400, contentType: jsonType,
		body: strings.Replace(errorBody(400), "false", "true", 1), want: "error body: at '/success'"},
	{name: "error without a sentence", request: "POST /locks/123/OpenLock", status: 400, contentType: jsonType,
		body: strings.Replace(errorBody(400), "What to do.", "", 1), want: "error body: at '/message'"},
	{name: "error with another code", request: "POST /locks/123/OpenLock", status: 400, contentType: jsonType,
		body: strings.Replace(errorBody(400), `"code":400`, `"code":401`, 1), want: "code is 401, the status 400"},
	{name: "errors with another code", request: "POST /locks/123/OpenLock", status: 400, contentType: jsonType,
		body: strings.Replace(errorBody(400), `[{"code":400`, `[{"code":500`, 1), want: "errors[0].code is 500, the status 400"},
	{name: "errors without an item", request: "POST /locks/123/OpenLock", status: 400, contentType: jsonType,
		body: `{"success":false,"error":"e","message":"m","code":400,"errors":[]}`, want: "error body: at '/errors'"},
	{name: "error outside the contract", request: "GET /nowhere", status: 404, contentType: jsonType, body: `{"error":"e"}`, want: "missing properties"},
	{name: "method outside the contract", request: "GET /locks/1/OpenLock", status: 405, contentType: jsonType, body: `{}`, want: "missing properties"},
}

func TestGoodAnswersPass(t *testing.T) {
	for _, a := range goodAnswers {
		t.Run(a.name, func(t *testing.T) {
			complaints, body := ask(t, a)
			if len(complaints) > 0 {
				t.Errorf("unwanted complaints: %s", complaints)
			}
			if body != a.body {
				t.Errorf("the caller read %q, want %q", body, a.body)
			}
		})
	}
}

func TestWrongAnswersFail(t *testing.T) {
	for _, a := range wrongAnswers {
		t.Run(a.name, func(t *testing.T) {
			complaints, body := ask(t, a)
			if len(complaints) != 1 {
				t.Fatalf("want one complaint, got %d: %s", len(complaints), complaints)
			}
			method, path, _ := strings.Cut(a.request, " ")
			for _, part := range []string{a.want, method, path, fmt.Sprint(a.status)} {
				if !strings.Contains(complaints[0], part) {
					t.Errorf("%q is not in the complaint: %s", part, complaints[0])
				}
			}
			if body != a.body {
				t.Errorf("the caller read %q, want %q", body, a.body)
			}
		})
	}
}

func TestSeenCountsRoutesOfTheContract(t *testing.T) {
	server := serve(t, answer{status: 200, contentType: jsonType, body: opened})
	v := contracttest.New(t)
	client := clientOf(v)
	for _, id := range []string{"1", "2"} {
		send(t, client, "POST "+server.URL+"/locks/"+id+"/OpenLock")
	}
	send(t, client, "GET "+server.URL+"/healthz")

	want := map[string]int{"POST /locks/{id}/OpenLock 200": 2}
	if got := v.Seen(); !maps.Equal(got, want) {
		t.Errorf("seen %v, want %v", got, want)
	}
}

func TestOneValidatorServesManyGoroutines(t *testing.T) {
	server := serve(t, answer{status: 200, contentType: jsonType, body: opened})
	v := contracttest.New(t)
	client := clientOf(v)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() { send(t, client, "POST "+server.URL+"/locks/1/OpenLock") })
	}
	callers.Wait()
	if got := v.Seen()["POST /locks/{id}/OpenLock 200"]; got != 8 {
		t.Errorf("seen %d answers, want 8", got)
	}
}

func TestCutAnswerReachesTheCaller(t *testing.T) {
	cut := errors.New("cut off")
	next := transport(func(*http.Request) (*http.Response, error) {
		body := io.MultiReader(strings.NewReader(opened[:20]), iotest.ErrReader(cut))
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {jsonType}}, Body: io.NopCloser(body)}, nil
	})
	resp, err := contracttest.New(t).Transport(next).RoundTrip(httptest.NewRequest("POST", "/locks/1/OpenLock", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if string(body) != opened[:20] || !errors.Is(err, cut) {
		t.Errorf("the caller read %q and %v", body, err)
	}
}

func TestStreamOutsideTheContractIsNotRead(t *testing.T) {
	stream, feed := io.Pipe()
	defer feed.Close()
	next := transport(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"text/event-stream"}}, Body: stream}, nil
	})
	resp, err := contracttest.New(t).Transport(next).RoundTrip(httptest.NewRequest("GET", "/stream", nil))
	if err != nil {
		t.Fatal(err)
	}
	if resp.Body != stream {
		t.Error("the body was replaced")
	}
	resp.Body.Close()
}

func TestFailedRequestReachesTheCaller(t *testing.T) {
	refused := errors.New("refused")
	next := transport(func(*http.Request) (*http.Response, error) { return nil, refused })
	v := contracttest.New(t)
	resp, err := v.Transport(next).RoundTrip(httptest.NewRequest("POST", "/locks/1/OpenLock", nil))
	if resp != nil || !errors.Is(err, refused) || len(v.Seen()) != 0 {
		t.Errorf("got %v, %v, seen %v", resp, err, v.Seen())
	}
}

func TestReferenceIsThePage(t *testing.T) {
	if !strings.Contains(contracttest.Reference, "/locks/123/OpenLock") {
		t.Error("the reference page does not speak of OpenLock")
	}
}

type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// recorder is a test that keeps the complaints against it.
type recorder struct {
	testing.TB
	complaints []string
}

func (r *recorder) Helper() {}

func (r *recorder) Errorf(format string, args ...any) {
	r.complaints = append(r.complaints, fmt.Sprintf(format, args...))
}

// ask sends one request to a server that answers a, through a Validator.
func ask(t *testing.T, a answer) (complaints []string, body string) {
	t.Helper()
	server := serve(t, a)
	judge := &recorder{TB: t}
	method, path, _ := strings.Cut(a.request, " ")
	body = send(t, clientOf(contracttest.New(judge)), method+" "+server.URL+path)
	return judge.complaints, body
}

func serve(t *testing.T, a answer) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil // nil keeps net/http from guessing one
		if a.contentType != "" {
			w.Header().Set("Content-Type", a.contentType)
		}
		w.WriteHeader(a.status)
		_, _ = io.WriteString(w, a.body)
	}))
	t.Cleanup(server.Close)
	return server
}

// clientOf returns a client that shows redirects instead of following them.
func clientOf(v *contracttest.Validator) *http.Client {
	return &http.Client{
		Transport:     v.Transport(nil),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// send may be called from any goroutine: it fails the test without ending it.
func send(t *testing.T, client *http.Client, request string) (body string) {
	t.Helper()
	method, url, _ := strings.Cut(request, " ")
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Error(err)
		return ""
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	read, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return string(read)
}
