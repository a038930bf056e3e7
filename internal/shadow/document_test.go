package shadow_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/openlock/openlock/internal/shadow"
)

// at is the time of the nth update in a test.
func at(n int) time.Time { return time.Unix(int64(n), 999_999_999) }

func parse(t testing.TB, payload string) shadow.Update {
	t.Helper()
	u, err := shadow.ParseUpdate([]byte(payload))
	if err != nil {
		t.Fatalf("%s: %v", payload, err)
	}
	return u
}

// fold applies the states to a new shadow, the nth at the nth second.
func fold(t testing.TB, states ...string) shadow.Document {
	t.Helper()
	var d shadow.Document
	for i, state := range states {
		var err error
		if d, err = d.Apply(parse(t, `{"state":`+state+`}`), at(i+1)); err != nil {
			t.Fatalf("%s: %v", state, err)
		}
	}
	return d
}

func want(t testing.TB, got []byte, want string) {
	t.Helper()
	if string(got) != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
}

// wantState compares the whole state, delta included.
func wantState(t testing.TB, d shadow.Document, state string) {
	t.Helper()
	var body struct{ State json.RawMessage }
	if err := json.Unmarshal(d.GetAccepted("", at(0)), &body); err != nil {
		t.Fatal(err)
	}
	want(t, body.State, state)
}

func wantError(t testing.TB, err error, code int, message, token string) {
	t.Helper()
	var refusal *shadow.Error
	if !errors.As(err, &refusal) {
		t.Fatalf("got %v, want %d %s", err, code, message)
	}
	if *refusal != (shadow.Error{Code: code, Message: message, ClientToken: token}) {
		t.Errorf("got %+v, want %d %q for %q", *refusal, code, message, token)
	}
}

// Errors: 400, each in AWS's words, with the client token once it could be read.
func TestParseUpdateRefuses(t *testing.T) {
	tests := []struct{ name, payload, message, token string }{
		{"nothing", ``, "Invalid JSON", ""},
		{"half", `{"state":`, "Invalid JSON", ""},
		{"two values", `{"state":{}}{}`, "Invalid JSON", ""},
		{"not an object", `[]`, "Invalid JSON", ""},
		{"null", `null`, "Invalid JSON", ""},
		{"a duplicate name", `{"clientToken":"t","state":{},"state":{}}`, "Invalid JSON", ""},
		{"a duplicate name in state", `{"state":{"desired":{"a":[{"b":1,"b":2}]}}}`, "Invalid JSON", ""},
		{"a duplicate name by escape", `{"state":{"desired":{"a":1,"\u0061":2}}}`, "Invalid JSON", ""},
		{"a duplicate name in an ignored key", `{"x":{"a":1,"a":2},"state":{}}`, "Invalid JSON", ""},
		{"invalid UTF-8", "{\"state\":{\"desired\":{\"a\":\"\xff\"}}}", "Invalid JSON", ""},
		{"half a surrogate pair", `{"state":{"desired":{"a":"\ud800"}}}`, "Invalid JSON", ""},
		{"no state", `{"clientToken":"t"}`, "Missing required node: state", "t"},
		{"state null", `{"state":null,"clientToken":"t"}`, "State node must be an object", "t"},
		{"state an array", `{"state":[],"clientToken":"t"}`, "State node must be an object", "t"},
		{"desired a number", `{"state":{"desired":1},"clientToken":"t"}`, "Desired node must be an object", "t"},
		{"desired an array", `{"state":{"desired":[]}}`, "Desired node must be an object", ""},
		{"reported a string", `{"state":{"reported":"on"},"clientToken":"t"}`, "Reported node must be an object", "t"},
		{"another node in state", `{"state":{"delta":{}},"clientToken":"t"}`, "State contains an invalid node", "t"},
		{"an array that holds null", `{"state":{"desired":{"a":[1,null]}},"clientToken":"t"}`, "State contains an invalid node", "t"},
		{"an array that holds null deeper", `{"state":{"reported":{"a":[{"b":[{"c":null}]}]}}}`, "State contains an invalid node", ""},
		{"version a string", `{"state":{},"version":"1","clientToken":"t"}`, "Invalid version", "t"},
		{"version a fraction", `{"state":{},"version":1.5}`, "Invalid version", ""},
		{"version negative", `{"state":{},"version":-1}`, "Invalid version", ""},
		{"version beyond counting", `{"state":{},"version":9223372036854775808}`, "Invalid version", ""},
		{"clientToken a number", `{"state":{},"clientToken":1}`, "Invalid clientToken", ""},
		{"clientToken of 65 bytes", `{"state":{},"clientToken":"` + strings.Repeat("x", 65) + `"}`, "Invalid clientToken", ""},
		{"clientToken of 33 characters in 66 bytes", `{"state":{},"clientToken":"` + strings.Repeat("é", 33) + `"}`, "Invalid clientToken", ""},
		{"nine levels", `{"state":{"desired":` + nested(9) + `},"clientToken":"t"}`, "JSON contains too many levels of nesting; maximum is 8", "t"},
		{"nine levels of arrays", `{"state":{"desired":{"a":` + strings.Repeat("[", 9) + strings.Repeat("]", 9) + `}}}`, "JSON contains too many levels of nesting; maximum is 8", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := shadow.ParseUpdate([]byte(tt.payload))
			wantError(t, err, 400, tt.message, tt.token)
		})
	}
}

// nested is a section with this many levels of objects below it.
func nested(levels int) string {
	return strings.Repeat(`{"a":`, levels+1) + `1` + strings.Repeat(`}`, levels+1)
}

func TestParseUpdateAccepts(t *testing.T) {
	token := strings.Repeat("x", 64)
	tests := []struct{ name, payload, token string }{
		{"an empty state", `{"state":{}}`, ""},
		{"other top-level keys, as SDK v2 sends thingName", `{"thingName":"door","x":null,"state":{}}`, ""},
		{"a clientToken of 64 bytes", `{"state":{},"clientToken":"` + token + `"}`, token},
		{"nulls for what is optional", `{"state":{},"clientToken":null,"version":null}`, ""},
		{"eight levels", `{"state":{"desired":` + nested(8) + `}}`, ""},
		{"spaces", " \n{ \"state\" : { } } ", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if u := parse(t, tt.payload); u.ClientToken != tt.token || u.Version != nil {
				t.Errorf("got %+v", u)
			}
		})
	}
	if u := parse(t, `{"state":{},"version":7}`); u.Version == nil || *u.Version != 7 {
		t.Errorf("got version %v", u.Version)
	}
}

// Nobody makes us read more than MaxPayload, nor recurse into it.
func TestParseUpdateBoundsItsWork(t *testing.T) {
	padded := `{"state":{}` + strings.Repeat(" ", shadow.MaxPayload-12) + `}`
	parse(t, padded)
	_, err := shadow.ParseUpdate([]byte(padded + " "))
	wantError(t, err, 413, "The payload exceeds the maximum size allowed", "")

	deep := strings.Repeat("[", 5000) + strings.Repeat("]", 5000)
	_, err = shadow.ParseUpdate([]byte(`{"state":{"desired":{"a":` + deep + `}}}`))
	wantError(t, err, 400, "JSON contains too many levels of nesting; maximum is 8", "")
}

// P/get and P/delete: the body is empty or {clientToken}.
func TestParseRequest(t *testing.T) {
	for payload, token := range map[string]string{
		"": "", " \n": "", "{}": "", `{"clientToken":"t"}`: "t", `{"clientToken":null,"x":[1]}`: "",
	} {
		if got, err := shadow.ParseRequest([]byte(payload)); got != token || err != nil {
			t.Errorf("%q: got %q, %v", payload, got, err)
		}
	}
	for payload, message := range map[string]string{
		"null": "Invalid JSON", "[]": "Invalid JSON", "{": "Invalid JSON", "x": "Invalid JSON",
		`{"clientToken":{}}`: "Invalid clientToken",
	} {
		_, err := shadow.ParseRequest([]byte(payload))
		wantError(t, err, 400, message, "")
	}
	_, err := shadow.ParseRequest(bytes.Repeat([]byte("x"), shadow.MaxPayload+1))
	wantError(t, err, 413, "The payload exceeds the maximum size allowed", "")
}

func TestMerge(t *testing.T) {
	tests := []struct {
		rule, first, second, state string
	}{
		{"merge is deep", `{"reported":{"a":{"b":1,"c":2},"d":3}}`, `{"reported":{"a":{"b":4}}}`, `{"reported":{"a":{"b":4,"c":2},"d":3}}`},
		{"null deletes", `{"reported":{"a":1,"b":{"c":2,"d":3}}}`, `{"reported":{"a":null,"b":{"c":null}}}`, `{"reported":{"b":{"d":3}}}`},
		{"null deletes a whole object", `{"reported":{"a":{"b":1},"c":2}}`, `{"reported":{"a":null}}`, `{"reported":{"c":2}}`},
		{"null deletes what is not there", `{"reported":{"a":1}}`, `{"reported":{"x":null,"y":{"z":null}}}`, `{"reported":{"a":1}}`},
		{"null never creates", `{}`, `{"reported":{"x":null,"y":{"z":null}}}`, `{}`},
		{"arrays are replaced whole", `{"reported":{"a":[1,{"b":2},3]}}`, `{"reported":{"a":[{"c":4}]}}`, `{"reported":{"a":[{"c":4}]}}`},
		{"an empty array is a value", `{"reported":{"a":[1]}}`, `{"reported":{"a":[]}}`, `{"reported":{"a":[]}}`},
		{"a scalar replaces an object", `{"reported":{"a":{"b":1}}}`, `{"reported":{"a":2}}`, `{"reported":{"a":2}}`},
		{"an object replaces a scalar", `{"reported":{"a":2}}`, `{"reported":{"a":{"b":1}}}`, `{"reported":{"a":{"b":1}}}`},
		{"an object replaces an array", `{"reported":{"a":[2]}}`, `{"reported":{"a":{"b":1}}}`, `{"reported":{"a":{"b":1}}}`},
		{"desired null drops the section", `{"desired":{"a":1},"reported":{"a":1}}`, `{"desired":null}`, `{"reported":{"a":1}}`},
		{"reported null drops the section", `{"desired":{"a":1},"reported":{"a":1}}`, `{"reported":null}`, `{"desired":{"a":1},"delta":{"a":1}}`},
		{"desired is not cleared when reported catches up", `{"desired":{"a":1}}`, `{"reported":{"a":1}}`, `{"desired":{"a":1},"reported":{"a":1}}`},
		{"an empty update changes nothing", `{"desired":{"a":1}}`, `{"desired":{}}`, `{"desired":{"a":1},"delta":{"a":1}}`},
		{"a section that becomes empty disappears", `{"desired":{"a":1},"reported":{"b":1}}`, `{"desired":{"a":null}}`, `{"reported":{"b":1}}`},
		{"an object that becomes empty disappears", `{"reported":{"a":{"b":{"c":1}},"d":2}}`, `{"reported":{"a":{"b":{"c":null}}}}`, `{"reported":{"d":2}}`},
		{"an empty object is nothing", `{"reported":{"a":{"b":1},"c":2}}`, `{"reported":{"a":{},"c":{},"d":{"e":{}}}}`, `{"reported":{"a":{"b":1}}}`},
		{"numbers are kept as sent", `{}`, `{"reported":{"a":1.0,"b":12345678901234567890123,"c":-0,"d":1E+2,"e":1e999}}`, `{"reported":{"a":1.0,"b":12345678901234567890123,"c":-0,"d":1E+2,"e":1e999}}`},
		{"strings are kept, escapes are not", `{}`, `{"reported":{"\u0061":"\u00e9\/<\u0001"}}`, `{"reported":{"a":"é/<\u0001"}}`},
	}
	for _, tt := range tests {
		t.Run(tt.rule, func(t *testing.T) {
			d := fold(t, tt.first, tt.second)
			wantState(t, d, tt.state)
			mustSurvive(t, d)
		})
	}
}

// Delta: every desired leaf that differs from reported, desired-only included,
// reported-only not; a differing array whole.
func TestDelta(t *testing.T) {
	tests := []struct{ rule, desired, reported, delta string }{
		{"no difference", `{"a":1}`, `{"a":1}`, ``},
		{"a leaf that differs", `{"a":1,"b":2}`, `{"a":1,"b":3}`, `{"b":2}`},
		{"a leaf within", `{"a":{"b":1,"c":{"d":2}}}`, `{"a":{"b":1,"c":{"d":3}}}`, `{"a":{"c":{"d":2}}}`},
		{"desired only", `{"a":{"b":1}}`, `{"x":1}`, `{"a":{"b":1}}`},
		{"nothing reported", `{"a":1}`, `null`, `{"a":1}`},
		{"reported only", `{"a":1}`, `{"a":1,"b":{"c":2}}`, ``},
		{"nothing desired", `null`, `{"a":1}`, ``},
		{"an array that differs, whole", `{"a":[1,2,3]}`, `{"a":[1,2,4]}`, `{"a":[1,2,3]}`},
		{"a shorter array", `{"a":[1,2]}`, `{"a":[1,2,3]}`, `{"a":[1,2]}`},
		{"a longer array", `{"a":[1,[2]]}`, `{"a":[1]}`, `{"a":[1,[2]]}`},
		{"the order of an array", `{"a":[1,2]}`, `{"a":[2,1]}`, `{"a":[1,2]}`},
		{"no order of names in an array", `{"a":[{"b":1,"c":2}]}`, `{"a":[{"c":2,"b":1}]}`, ``},
		{"an array for an object", `{"a":[]}`, `{"a":{"b":1}}`, `{"a":[]}`},
		{"an object for a scalar", `{"a":{"b":1}}`, `{"a":1}`, `{"a":{"b":1}}`},
		{"a scalar for an object", `{"a":1}`, `{"a":{"b":1}}`, `{"a":1}`},
		{"a string is no number", `{"a":"1"}`, `{"a":1}`, `{"a":"1"}`},
		{"a bool is no string", `{"a":true}`, `{"a":"true"}`, `{"a":true}`},
		{"equal numbers in other words", `{"a":1,"b":100,"c":0,"d":0.01,"e":[-2.50]}`, `{"a":1.0,"b":1E2,"c":-0.0,"d":10e-3,"e":[-25e-1]}`, ``},
		{"numbers beyond float64", `{"a":9007199254740993,"b":0.1}`, `{"a":9007199254740992,"b":0.10000000000000000001}`, `{"a":9007199254740993,"b":0.1}`},
		{"the sign", `{"a":-1}`, `{"a":1}`, `{"a":-1}`},
		{"a power of ten", `{"a":10,"b":0.1}`, `{"a":1,"b":0.01}`, `{"a":10,"b":0.1}`},
		{"exponents beyond reason", `{"a":1e99999999999999999999,"b":1e999999999}`, `{"a":1e99999999999999999999,"b":1e999999998}`, `{"b":1e999999999}`},
	}
	for _, tt := range tests {
		t.Run(tt.rule, func(t *testing.T) {
			d := fold(t, `{"desired":`+tt.desired+`,"reported":`+tt.reported+`}`)
			body, ok := d.Delta("", at(2))
			if ok != (tt.delta != "") {
				t.Fatalf("ok is %v: %s", ok, body)
			}
			var got struct{ State json.RawMessage }
			if ok && json.Unmarshal(body, &got) != nil {
				t.Fatalf("not JSON: %s", body)
			}
			want(t, got.State, tt.delta)
		})
	}
}

// P/get/accepted: whole state, state.delta if any, metadata, version, timestamp,
// clientToken. Metadata mirrors the tree with {"timestamp": epoch seconds} at each leaf,
// each array element; the top-level timestamp is the response's.
func TestGetAccepted(t *testing.T) {
	d := fold(t,
		`{"desired":{"a":{"b":1},"c":[1,[2,{"d":3}],{}]},"reported":{"a":{"b":1}}}`,
		`{"desired":{"a":{"e":2}},"reported":{"a":{"b":1}}}`,
		`{"reported":{"timestamp":0}}`)
	want(t, d.GetAccepted("token", at(9)), `{`+
		`"state":{"desired":{"a":{"b":1,"e":2},"c":[1,[2,{"d":3}],{}]},`+
		`"reported":{"a":{"b":1},"timestamp":0},`+
		`"delta":{"a":{"e":2},"c":[1,[2,{"d":3}],{}]}},`+
		`"metadata":{"desired":{"a":{"b":{"timestamp":1},"e":{"timestamp":2}},"c":[{"timestamp":1},[{"timestamp":1},{"d":{"timestamp":1}}],{}]},`+
		`"reported":{"a":{"b":{"timestamp":2}},"timestamp":{"timestamp":3}}},`+
		`"version":3,"timestamp":9,"clientToken":"token"}`)
	want(t, fold(t, `{}`).GetAccepted("", at(9)), `{"state":{},"metadata":{},"version":1,"timestamp":9}`)
}

// P/update/accepted: only the fields of the request, nulls included, with their metadata,
// version, timestamp, clientToken.
func TestUpdateAccepted(t *testing.T) {
	before := fold(t, `{"desired":{"a":1,"b":{"c":2,"d":3}},"reported":{"a":1}}`)
	u := parse(t, `{"state":{"desired":{"b":{"c":null,"e":[4,5]},"f":1.0}},"clientToken":"token","version":1,"x":1}`)
	after, err := before.Apply(u, at(2))
	if err != nil {
		t.Fatal(err)
	}
	want(t, shadow.UpdateAccepted(u, after, at(2)), `{`+
		`"state":{"desired":{"b":{"c":null,"e":[4,5]},"f":1.0}},`+
		`"metadata":{"desired":{"b":{"c":{"timestamp":2},"e":[{"timestamp":2},{"timestamp":2}]},"f":{"timestamp":2}}},`+
		`"version":2,"timestamp":2,"clientToken":"token"}`)

	u = parse(t, `{"state":{"desired":null,"reported":{}}}`)
	want(t, shadow.UpdateAccepted(u, after, at(3)), `{`+
		`"state":{"desired":null,"reported":{}},`+
		`"metadata":{"desired":{"timestamp":3},"reported":{}},`+
		`"version":2,"timestamp":3}`)
}

// P/update/delta: state is the bare difference, metadata is the desired metadata.
func TestDeltaBody(t *testing.T) {
	d := fold(t, `{"desired":{"a":{"b":1,"c":2},"d":[3]}}`, `{"desired":{"d":[4]}}`, `{"reported":{"a":{"c":2}}}`)
	body, _ := d.Delta("token", at(9))
	want(t, body, `{`+
		`"state":{"a":{"b":1},"d":[4]},`+
		`"metadata":{"a":{"b":{"timestamp":1}},"d":[{"timestamp":2}]},`+
		`"version":3,"timestamp":9,"clientToken":"token"}`)
}

// P/update/documents: previous and current, each {state, metadata, version}; no previous
// on create.
func TestDocuments(t *testing.T) {
	first := fold(t, `{"desired":{"a":1}}`)
	second := fold(t, `{"desired":{"a":1}}`, `{"reported":{"a":2}}`)
	const one = `{"state":{"desired":{"a":1}},"metadata":{"desired":{"a":{"timestamp":1}}},"version":1}`
	want(t, shadow.Documents(shadow.Document{}, first, "", at(1)), `{"current":`+one+`,"timestamp":1}`)
	want(t, shadow.Documents(first, second, "token", at(2)), `{"previous":`+one+`,"current":{`+
		`"state":{"desired":{"a":1},"reported":{"a":2}},`+
		`"metadata":{"desired":{"a":{"timestamp":1}},"reported":{"a":{"timestamp":2}}},`+
		`"version":2},"timestamp":2,"clientToken":"token"}`)

	again, err := first.Delete().Apply(shadow.Set("desired", nil), at(3))
	if err != nil {
		t.Fatal(err)
	}
	want(t, shadow.Documents(first.Delete(), again, "", at(3)), `{"current":{"state":{},"metadata":{},"version":2},"timestamp":3}`)
}

// P/delete/accepted is {version, timestamp, clientToken?}. The version survives a delete.
func TestDelete(t *testing.T) {
	d := fold(t, `{"desired":{"a":1}}`, `{}`)
	gone := d.Delete()
	if gone.Exists() || gone.Version() != 2 || !d.Exists() {
		t.Errorf("after the delete: %s", gone.Encode())
	}
	want(t, shadow.DeleteAccepted(gone, "token", at(3)), `{"version":2,"timestamp":3,"clientToken":"token"}`)
	want(t, shadow.DeleteAccepted(d, "", at(3)), `{"version":2,"timestamp":3}`)
	mustSurvive(t, gone)

	back, err := gone.Apply(parse(t, `{"state":{"reported":{"b":1}},"version":2}`), at(4))
	if err != nil || !back.Exists() || back.Version() != 3 {
		t.Fatalf("%v: %s", err, back.Encode())
	}
	wantState(t, back, `{"reported":{"b":1}}`)

	var never shadow.Document
	if never.Exists() || never.Version() != 0 || !reflect.DeepEqual(never.Delete(), never) {
		t.Error("a shadow that never existed is not the zero document")
	}
}

// Version: plus one an update, even an empty one; a supplied version must equal the
// current one, else 409.
func TestVersion(t *testing.T) {
	d := fold(t, `{}`, `{"desired":{}}`)
	for version, ok := range map[int]bool{0: false, 1: false, 2: true, 3: false} {
		u := parse(t, fmt.Sprintf(`{"state":{},"version":%d,"clientToken":"t"}`, version))
		next, err := d.Apply(u, at(3))
		if ok && (err != nil || next.Version() != 3) {
			t.Errorf("version %d: %v, now %d", version, err, next.Version())
		}
		if !ok {
			wantError(t, err, 409, "Version conflict", "t")
		}
	}
	if _, err := (shadow.Document{}).Apply(parse(t, `{"state":{},"version":0}`), at(1)); err != nil {
		t.Errorf("version 0 of a shadow that never existed: %v", err)
	}
}

// Limits: 8192 bytes for compact desired plus compact reported; 8192 passes.
func TestSize(t *testing.T) {
	// {"a":""} is 8 bytes; spaces, escapes and metadata do not count.
	state := func(n int) string {
		return `{ "desired" : { "\u0061" : "` + strings.Repeat("x", 4096-8) + `" }, "reported" : {"a":"` + strings.Repeat("y", n) + `"}}`
	}
	d := fold(t, state(4096-8))
	mustKeepLimits(t, d)

	u := parse(t, `{"state":`+state(4096-7)+`,"clientToken":"t"}`)
	_, err := shadow.Document{}.Apply(u, at(1))
	wantError(t, err, 413, "The payload exceeds the maximum size allowed", "t")

	_, err = d.Apply(parse(t, `{"state":{"reported":{"b":1}}}`), at(2))
	wantError(t, err, 413, "The payload exceeds the maximum size allowed", "")
	if _, err = d.Apply(parse(t, `{"state":{"reported":{"b":1,"a":null}}}`), at(2)); err != nil {
		t.Errorf("an update that makes room: %v", err)
	}
}

// An update by the server itself keeps the same limits, and nil in it deletes.
func TestSet(t *testing.T) {
	d := fold(t, `{"desired":{"open":["a",1,2],"mode":"on"}}`)
	d, err := d.Apply(shadow.Set("desired", map[string]any{"open": nil, "n": int64(9007199254740993)}), at(2))
	if err != nil {
		t.Fatal(err)
	}
	wantState(t, d, `{"desired":{"mode":"on","n":9007199254740993},"delta":{"mode":"on","n":9007199254740993}}`)

	_, err = d.Apply(shadow.Set("reported", map[string]any{"a": []any{nil}}), at(3))
	wantError(t, err, 400, "State contains an invalid node", "")
	_, err = d.Apply(shadow.Set("reported", map[string]any{"a": json.RawMessage(nested(8))}), at(3))
	wantError(t, err, 400, "JSON contains too many levels of nesting; maximum is 8", "")
	if d, err = d.Apply(shadow.Set("reported", map[string]any{"a": "\xff"}), at(3)); err != nil {
		t.Fatal(err)
	}
	if raw, ok := d.Reported("a"); string(raw) != `"�"` || !ok {
		t.Errorf("got %s", raw)
	}
}

// Only control writes desired.open, and reported.open comes only from the thing itself:
// what a request touches must be seen however it touches it.
func TestWhatAnUpdateTouches(t *testing.T) {
	tests := []struct {
		state   string
		desires bool
		reports string
	}{
		{`{}`, false, ``},
		{`{"desired":{},"reported":{}}`, false, ``},
		{`{"desired":{"opens":1,"a":{"open":1}},"reported":{"Open":1}}`, false, ``},
		{`{"desired":{"open":[ 1 ]}}`, true, ``},
		{`{"desired":{"o\u0070en":1}}`, true, ``},
		{`{"desired":{"open":null}}`, true, ``},
		{`{"desired":{"open":{}}}`, true, ``},
		{`{"desired":null}`, true, ``},
		{`{"reported":{"open":[ "a", 1.0 ]}}`, false, `["a",1.0]`},
		{`{"reported":{"open":null}}`, false, `null`},
		{`{"reported":null}`, false, `null`},
	}
	for _, tt := range tests {
		u := parse(t, `{"state":`+tt.state+`}`)
		if got := u.DesiredHas("open"); got != tt.desires {
			t.Errorf("%s: DesiredHas is %v", tt.state, got)
		}
		if raw, ok := u.Reports("open"); string(raw) != tt.reports || ok != (tt.reports != "") {
			t.Errorf("%s: reports %s, %v", tt.state, raw, ok)
		}
	}
}

func TestTopLevelKeys(t *testing.T) {
	d := fold(t, `{"desired":{"open":["a", 1],"m":{"b":{"c":1}}},"reported":{"n":1.50}}`)
	for _, tt := range []struct {
		of        func(string) ([]byte, bool)
		key, want string
	}{
		{d.Desired, "open", `["a",1]`},
		{d.Desired, "m", `{"b":{"c":1}}`},
		{d.Desired, "n", ``},
		{d.Reported, "n", `1.50`},
		{d.Reported, "open", ``},
	} {
		raw, ok := tt.of(tt.key)
		if string(raw) != tt.want || ok != (tt.want != "") {
			t.Errorf("%s: got %s, %v", tt.key, raw, ok)
		}
		clear(raw) // what a reader does to its bytes is its own affair
	}
	mustSurvive(t, d)
	wantState(t, d.Without("m"), `{"desired":{"open":["a",1]},"reported":{"n":1.50},"delta":{"open":["a",1]}}`)
}

// A get leaves an expired command out: in state, delta and metadata, version unchanged.
func TestWithout(t *testing.T) {
	d := fold(t, `{"desired":{"open":["a",1],"mode":1}}`, `{"desired":{"mode":null}}`)
	want(t, d.Without("open").GetAccepted("", at(3)), `{"state":{},"metadata":{},"version":2,"timestamp":3}`)
	if body, ok := d.Without("open").Delta("", at(3)); ok {
		t.Errorf("delta %s", body)
	}
	wantState(t, d.Without("other"), `{"desired":{"open":["a",1]},"delta":{"open":["a",1]}}`)
	wantState(t, d, `{"desired":{"open":["a",1]},"delta":{"open":["a",1]}}`)
	mustSurvive(t, d.Without("open"))
}

func TestDecodeDocumentRefuses(t *testing.T) {
	for _, b := range []string{
		``, `{`, `[]`,
		`{"version":1,"state":{"desired":1},"metadata":{}}`,
		`{"version":1,"state":{"desired":{"a":1}},"metadata":{}}`,
		`{"version":1,"state":{"desired":{"a":1}},"metadata":{"desired":{}}}`,
		`{"version":1,"state":{"reported":{"a":{"b":1}}},"metadata":{"reported":{"a":1}}}`,
	} {
		if d, err := shadow.DecodeDocument([]byte(b)); err == nil {
			t.Errorf("%s: decoded as %s", b, d.Encode())
		}
	}
}

// A store may have a notation of its own; what is decoded is as if it had none.
func TestDecodeDocumentIsCanonical(t *testing.T) {
	d, err := shadow.DecodeDocument([]byte(`{"version": 1, "metadata": {"desired": {"a": 1}},
		"state": {"desired": {"a": [1.0, {"c": "\u00e9", "b": 2}]}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if again := fold(t, `{"desired":{"a":[1.0,{"b":2,"c":"é"}]}}`); !reflect.DeepEqual(d, again) {
		t.Errorf("decoded %s, want %s", d.Encode(), again.Encode())
	}
}

// P/*/rejected is {code, message, clientToken?, timestamp?}.
func TestRejected(t *testing.T) {
	want(t, shadow.NotFound("door").For("token").Rejected(at(5)),
		`{"code":404,"message":"No shadow exists with name: 'door'","timestamp":5,"clientToken":"token"}`)
	want(t, shadow.ErrForbidden.Rejected(at(5)), `{"code":403,"message":"Forbidden","timestamp":5}`)
	want(t, shadow.NotFound("\xff\"").Rejected(at(5)),
		`{"code":404,"message":"No shadow exists with name: '�\"'","timestamp":5}`)

	if !errors.Is(shadow.ErrForbidden.For("token"), shadow.ErrForbidden) || errors.Is(shadow.ErrForbidden, shadow.ErrUnauthorized) {
		t.Error("errors.Is does not tell one refusal from another")
	}
}

// model is the rules once more, as plainly as they can be said: a section is a Go map, and
// whatever is not a map is a leaf.
type model = map[string]any

func modelMerge(old, patch model) model {
	merged := model{}
	for k, v := range old {
		merged[k] = v
	}
	for k, v := range patch {
		if below, ok := v.(model); ok {
			was, _ := old[k].(model)
			if m := modelMerge(was, below); len(m) > 0 {
				merged[k] = m
				continue
			}
			v = nil
		}
		merged[k] = v
		if v == nil {
			delete(merged, k)
		}
	}
	return merged
}

func modelDelta(desired, reported model) model {
	delta := model{}
	for k, v := range desired {
		below, ok := v.(model)
		if !ok {
			if !reflect.DeepEqual(v, reported[k]) {
				delta[k] = v
			}
			continue
		}
		have, _ := reported[k].(model)
		if d := modelDelta(below, have); len(d) > 0 {
			delta[k] = d
		}
	}
	return delta
}

// modelStamp has a time for each leaf of a patch, and null still for null.
func modelStamp(v any, now int) any {
	switch v := v.(type) {
	case model:
		stamped := model{}
		for k, below := range v {
			stamped[k] = modelStamp(below, now)
		}
		return stamped
	case []any:
		stamped := []any{}
		for _, element := range v {
			stamped = append(stamped, modelStamp(element, now))
		}
		return stamped
	case nil:
		return nil
	}
	return float64(now)
}

// unstamp turns {"timestamp": t} into t. No key of the model is called timestamp.
func unstamp(v any) any {
	switch v := v.(type) {
	case model:
		if at, ok := v["timestamp"]; ok {
			return at
		}
		for k := range v {
			v[k] = unstamp(v[k])
		}
	case []any:
		for i := range v {
			v[i] = unstamp(v[i])
		}
	}
	return v
}

var (
	scalars = rapid.OneOf(
		rapid.Map(rapid.IntRange(0, 2), func(n int) any { return float64(n) }),
		rapid.SampledFrom([]any{true, false, "", "x"}),
	)
	arrays = rapid.Map(rapid.SliceOfN(rapid.OneOf(scalars, rapid.Just(any(model{"a": 1.0}))), 0, 2), func(a []any) any { return a })
	keys   = rapid.SampledFrom([]string{"a", "b", "c"})
)

func objects(depth int) *rapid.Generator[model] {
	values := []*rapid.Generator[any]{scalars, arrays, rapid.Just(any(nil))}
	if depth > 0 {
		values = append(values, rapid.Map(objects(depth-1), func(m model) any { return m }))
	}
	return rapid.MapOfN(keys, rapid.OneOf(values...), 0, 3)
}

// The state is the fold of the updates: any sequence of them gives the state, the delta
// and the metadata that the model gives, and the durable form loses nothing.
func TestFoldIsTheModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var d shadow.Document
		state := map[string]model{"desired": {}, "reported": {}}
		metadata := map[string]model{"desired": {}, "reported": {}}
		for now := range rapid.IntRange(1, 6).Draw(t, "updates") {
			patch := rapid.MapOfN(rapid.SampledFrom([]string{"desired", "reported"}), objects(2), 0, 2).Draw(t, "patch")
			payload, _ := json.Marshal(map[string]any{"state": patch})
			u, err := shadow.ParseUpdate(payload)
			if err != nil {
				t.Fatalf("%s: %v", payload, err)
			}
			earlier := d.Encode()
			next, err := d.Apply(u, at(now))
			if err != nil {
				t.Fatalf("%s: %v", payload, err)
			}
			if !bytes.Equal(d.Encode(), earlier) {
				t.Fatal("Apply modified its receiver")
			}
			for section, p := range patch {
				state[section] = modelMerge(state[section], p)
				metadata[section] = modelMerge(metadata[section], modelStamp(p, now).(model))
			}
			if d, err = shadow.DecodeDocument(next.Encode()); err != nil || !reflect.DeepEqual(d, next) {
				t.Fatalf("%s decoded as %s: %v", next.Encode(), d.Encode(), err)
			}
			compare(t, d, state, metadata)
		}
	})
}

func compare(t *rapid.T, d shadow.Document, state, metadata map[string]model) {
	var body struct{ State, Metadata map[string]model }
	if err := json.Unmarshal(d.GetAccepted("", at(0)), &body); err != nil {
		t.Fatal(err)
	}
	delta := modelDelta(state["desired"], state["reported"])
	want := map[string]model{"desired": state["desired"], "reported": state["reported"], "delta": delta}
	for section, w := range want {
		if got := body.State[section]; !reflect.DeepEqual(got, w) && len(got)+len(w) > 0 {
			t.Fatalf("%s is %v, want %v", section, got, w)
		}
	}
	for section, w := range metadata {
		got, _ := unstamp(body.Metadata[section]).(model)
		if !reflect.DeepEqual(got, w) && len(got)+len(w) > 0 {
			t.Fatalf("metadata of %s is %v, want %v", section, got, w)
		}
	}
	if _, ok := d.Delta("", at(0)); ok != (len(delta) > 0) {
		t.Fatalf("Delta is %v for %v", ok, delta)
	}
}
