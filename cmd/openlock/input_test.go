package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/contract"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// apiRoute is a route as routes.go or the contract names it.
type apiRoute struct{ method, path string }

func (a apiRoute) String() string { return a.method + " " + a.path }

var parameter = regexp.MustCompile(`\{[^}]*\}`)

// at fills in the route's parameters, in order; "x" where none are left.
func (a apiRoute) at(values ...string) string {
	return parameter.ReplaceAllStringFunc(a.path, func(string) string {
		if len(values) == 0 {
			return "x"
		}
		v := values[0]
		values = values[1:]
		return v
	})
}

var routeLine = regexp.MustCompile(`(?m)^\t\t\{"([A-Z]+)", "(/[^"]*)", (anybody|known|operator), `)

// servedRoutes reads the one list of routes, with who may call them, so that no
// new route escapes the tests that are for all of them.
func servedRoutes(t testing.TB) map[apiRoute]string {
	t.Helper()
	source, err := os.ReadFile("../../internal/api/routes.go")
	if err != nil {
		t.Fatal(err)
	}
	served := map[apiRoute]string{}
	for _, m := range routeLine.FindAllStringSubmatch(string(source), -1) {
		served[apiRoute{m[1], m[2]}] = m[3]
	}
	if want := strings.Count(string(source), "(*Server)."); len(served) != want {
		t.Fatalf("read %d routes out of routes.go, which has %d", len(served), want)
	}
	return served
}

// documentedRoutes are the routes of the contract, with their 2xx statuses.
func documentedRoutes(t testing.TB) map[apiRoute][]string {
	t.Helper()
	var doc struct {
		Paths map[string]map[string]struct {
			Responses map[string]any `json:"responses"`
		} `json:"paths"`
	}
	if err := json.Unmarshal(contract.OpenAPI, &doc); err != nil {
		t.Fatal(err)
	}
	documented := map[apiRoute][]string{}
	for path, methods := range doc.Paths {
		for method, operation := range methods {
			a := apiRoute{strings.ToUpper(method), path}
			documented[a] = slices.DeleteFunc(slices.Sorted(maps.Keys(operation.Responses)), func(s string) bool { return s[0] != '2' })
		}
	}
	return documented
}

func lockRoutes[V any](routes map[apiRoute]V) (all []apiRoute) {
	for a := range routes {
		if strings.HasPrefix(a.path, "/locks/{id}") {
			all = append(all, a)
		}
	}
	return all
}

// exchange sends a request as it is. Every answer that a test gets in this way
// is one of the API's own: no redirect, and a JSON body unless it is to HEAD.
func (r *rig) exchange(req *http.Request) reply {
	r.t.Helper()
	resp, err := r.client.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	a := reply{status: resp.StatusCode, header: resp.Header, raw: string(raw)}
	if req.Method != http.MethodHead {
		err = json.Unmarshal(raw, &a.body)
	}
	if err != nil || a.status >= 300 && a.status < 400 {
		r.t.Errorf("%s %s answered %d, %v: %s", req.Method, req.URL, a.status, err, raw)
	}
	return a
}

// request prepares a request without a content type.
func (r *rig) request(method, path string, c creds, body io.Reader) *http.Request {
	r.t.Helper()
	req, err := http.NewRequest(method, r.url()+path, body)
	if err != nil {
		r.t.Fatal(err)
	}
	if c.key != "" {
		req.Header.Set("X-API-Key", c.key)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	return req
}

// trace is everything that a request could have changed: the log's end, and
// organizations with their credentials.
func (r *rig) trace() string {
	r.t.Helper()
	s := fmt.Sprintln(r.position())
	orgs, err := r.db.Organizations(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, o := range orgs {
		s += fmt.Sprintln(o)
		for _, kind := range []store.CredentialKind{store.APIKey, store.Client} {
			all, err := r.registry.List(r.t.Context(), o.ID, kind)
			if err != nil {
				r.t.Fatal(err)
			}
			for _, c := range all {
				c.UsedAt = time.Time{} // noted in its own time
				s += fmt.Sprintln(c)
			}
		}
	}
	return s
}

// refused holds that what do asks for is refused with a status and leaves no
// trace. It reads the error's message back.
func (r *rig) refused(name string, status int, do func() reply) (message string) {
	r.t.Helper()
	before := r.trace()
	a := do()
	if a.status != status {
		r.t.Errorf("%s: status %d, want %d: %.300s", name, a.status, status, a.raw)
	}
	if after := r.trace(); after != before {
		r.t.Errorf("%s: was refused, but left\n%s\nfor\n%s", name, after, before)
	}
	message, _ = a.get("message").(string)
	return message
}

func TestALockIDIsAStrictDecimal(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	for _, id := range []string{
		"0", "01", "00", "+1", "-1", "-0", "1.0", "1.", ".1", "1e3", "0x1", "1_0", "1,0", "abc", "1a", "NaN", "null", "true",
		"9007199254740992", "9223372036854775808", "99999999999999999999", "18446744073709551617",
		"%31", "1%2F2", "1%252F2", "..%2f1", "%2e%2e", "1%00", "%001", "1%20", "%0a1", "1%3Fx", "1%23",
		".", "..", "", "\u0661", "\uff11", "\u2167", "1;v=1", "{id}", "*",
	} {
		for _, a := range lockRoutes(servedRoutes(t)) {
			name := a.method + " " + a.at(id)
			r.refused(name, http.StatusBadRequest, func() reply {
				return r.exchange(r.request(a.method, a.at(id), acme, strings.NewReader(`{}`)))
			})
		}
	}
	r.want(r.send("GET", "/locks/1/basic-info", acme, nil), http.StatusOK)
	r.want(r.send("GET", "/locks/"+lock.MaxID.String()+"/basic-info", acme, nil), http.StatusNotFound)
}

func TestAPathThatIsNotPlainIsRefusedAndNeverRedirected(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	for path, status := range map[string]int{
		"/locks/1/OpenLock/":          http.StatusNotFound,
		"/locks/1/openlock":           http.StatusNotFound,
		"/Locks/1/OpenLock":           http.StatusNotFound,
		"/locks/1":                    http.StatusNotFound,
		"/locks/1/":                   http.StatusNotFound,
		"/locks/1/2/OpenLock":         http.StatusNotFound,
		"/locks":                      http.StatusNotFound,
		"/":                           http.StatusNotFound,
		"/nothing":                    http.StatusNotFound,
		"/locks/1/OpenLock;x=1":       http.StatusNotFound,
		"//locks/1/OpenLock":          http.StatusBadRequest,
		"/locks//1/OpenLock":          http.StatusBadRequest,
		"/locks/1//OpenLock":          http.StatusBadRequest,
		"/locks/1/OpenLock//":         http.StatusBadRequest,
		"/locks//OpenLock":            http.StatusBadRequest,
		"/./locks/1/OpenLock":         http.StatusBadRequest,
		"/locks/1/./OpenLock":         http.StatusBadRequest,
		"/locks/2/../1/OpenLock":      http.StatusBadRequest,
		"/../locks/1/OpenLock":        http.StatusBadRequest,
		"/locks/1/OpenLock/..":        http.StatusBadRequest,
		"/locks/2/..%2f1/OpenLock":    http.StatusBadRequest,
		"/locks/2/%2e%2e/1/OpenLock":  http.StatusBadRequest,
		"/locks/1/OpenLock%20":        http.StatusBadRequest,
		"/locks/1/Open%4Cock":         http.StatusBadRequest,
		"/locks%2F1/OpenLock":         http.StatusBadRequest,
		"/locks/1/OpenLock%3Fa=b":     http.StatusBadRequest,
		"/admin/organizations/../../": http.StatusBadRequest,
	} {
		for _, method := range []string{"GET", "POST"} {
			r.refused(method+" "+path, status, func() reply { return r.exchange(r.request(method, path, acme, nil)) })
		}
	}
}

// goodBodies are bodies that succeed, for every served route that reads JSON.
// Their order lets each one succeed.
var goodBodies = []struct {
	apiRoute
	body   string
	status int
}{
	{apiRoute{"POST", "/locks/{id}/CreateLock"}, `{"index":1,"uuid":"u-1"}`, http.StatusCreated},
	{apiRoute{"POST", "/locks/{id}/SetOwner"}, `{"userId":"u"}`, http.StatusOK},
	{apiRoute{"POST", "/locks/{id}/SetOrganization"}, `{"orgId":"acme"}`, http.StatusOK},
	{apiRoute{"POST", "/locks/{id}/AddKey"}, `{"keyUuid":"k"}`, http.StatusOK},
	{apiRoute{"POST", "/locks/{id}/RemoveKey"}, `{"keyUuid":"k"}`, http.StatusOK},
	{apiRoute{"POST", "/locks/{id}/OpenLock"}, `{"reason":"r"}`, http.StatusBadGateway}, // no device
	{apiRoute{"POST", "/admin/organizations"}, `{"id":"beta"}`, http.StatusCreated},
	{apiRoute{"POST", "/admin/tokens/revoke"}, `{"jti":"j"}`, http.StatusOK},
	{apiRoute{"POST", "/admin/organizations/{org}/open-expiry"}, `{"openExpirySeconds":9}`, http.StatusOK},
	{apiRoute{"POST", "/admin/organizations/{org}/keys"}, `{"name":"n"}`, http.StatusCreated},
	{apiRoute{"POST", "/admin/organizations/{org}/clients"}, `{"name":"n"}`, http.StatusCreated},
	{apiRoute{"POST", "/admin/organizations/{org}/keys/{credential}/rotate"}, `{"overlapSeconds":1}`, http.StatusCreated},
	{apiRoute{"POST", "/admin/organizations/{org}/clients/{credential}/rotate"}, `{"overlapSeconds":1}`, http.StatusCreated},
}

// bodiless are the POST routes that read no JSON.
var bodiless = []string{
	"/oauth/token", "/admin/users/{user}/suspend", "/admin/users/{user}/reactivate",
}

// corruptions make a body that must be refused out of one that is good.
var corruptions = map[string]func(good string) string{
	"null":      func(string) string { return `null` },
	"true":      func(string) string { return `true` },
	"number":    func(string) string { return `1` },
	"string":    func(string) string { return `"x"` },
	"array":     func(string) string { return `[]` },
	"in array":  func(g string) string { return `[` + g + `]` },
	"space":     func(string) string { return ` ` },
	"garbage":   func(string) string { return `requestId=1` },
	"cut off":   func(g string) string { return g[:len(g)-1] },
	"two":       func(g string) string { return g + g },
	"trailing":  func(g string) string { return g + `x` },
	"comma":     func(g string) string { return g + `,` },
	"closed":    func(g string) string { return g + `}` },
	"nul after": func(g string) string { return g + "\x00" },
	"BOM":       func(g string) string { return "\ufeff" + g },
	"UTF-16":    utf16LE,
	"comment":   func(g string) string { return `/* */` + g },

	"name twice":            func(g string) string { return with(g, g[1:len(g)-1]) },
	"unknown twice":         func(g string) string { return with(g, `"a":1,"a":1`) },
	"twice, escaped":        func(g string) string { return with(g, `"a":1,"\u0061":1`) },
	"twice, nested":         func(g string) string { return with(g, `"a":{"b":1,"b":2}`) },
	"twice, deep in arrays": func(g string) string { return with(g, `"a":[[{"b":{"c":1,"c":2}}]]`) },

	"bare name":         func(g string) string { return with(g, `a:1`) },
	"single quotes":     func(g string) string { return with(g, `'a':1`) },
	"no value":          func(g string) string { return with(g, `"a":`) },
	"trailing comma":    func(g string) string { return with(g, `"a":1,`) },
	"leading zero":      func(g string) string { return with(g, `"a":01`) },
	"plus":              func(g string) string { return with(g, `"a":+1`) },
	"NaN":               func(g string) string { return with(g, `"a":NaN`) },
	"hex":               func(g string) string { return with(g, `"a":0x1`) },
	"newline in string": func(g string) string { return with(g, "\"a\":\"\n\"") },
	"raw NUL":           func(g string) string { return with(g, "\"a\":\"\x00\"") },
	"bad escape":        func(g string) string { return with(g, `"a":"\x41"`) },
	"invalid UTF-8":     func(g string) string { return with(g, "\"a\":\"\xff\"") },
	"overlong":          func(g string) string { return with(g, "\"a\":\"\xc0\x80\"") },
	"raw surrogate":     func(g string) string { return with(g, "\"a\":\"\xed\xa0\x80\"") },
	"invalid name":      func(g string) string { return with(g, "\"\xff\":1") },
	"high surrogate":    func(g string) string { return with(g, `"a":"\ud800"`) },
	"low surrogate":     func(g string) string { return with(g, `"a":"\udc00"`) },
	"split surrogates":  func(g string) string { return with(g, `"a":"\ud83dx\ude00"`) },
	"deep":              func(g string) string { return with(g, `"a":`+strings.Repeat(`[`, 20_000)+strings.Repeat(`]`, 20_000)) },
	"deep, cut off":     func(g string) string { return with(g, `"a":`+strings.Repeat(`{"a":`, 12_000)) },
}

// with adds to an object's fields.
func with(object, more string) string { return object[:len(object)-1] + "," + more + "}" }

// utf16LE encodes what is ASCII.
func utf16LE(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		b.Write([]byte{c, 0})
	}
	return b.String()
}

func TestABodyIsOneStrictJSONObject(t *testing.T) {
	r := discreetRig(t)
	r.org("acme")
	super := r.super()
	at := func(a apiRoute) string { return a.at("1") }
	for _, g := range goodBodies {
		if strings.HasPrefix(g.path, "/admin") {
			at = func(a apiRoute) string { return a.at("acme", r.spare("acme", a)) }
		}
		path := at(g.apiRoute)
		for name, corrupt := range corruptions {
			name = g.path + ": " + name
			message := r.refused(name, http.StatusBadRequest, func() reply { return r.send(g.method, path, super, corrupt(g.body)) })
			if inGo.MatchString(message) {
				t.Errorf("%s: the message speaks of Go: %s", name, message)
			}
		}
		for name, body := range map[string]io.Reader{
			"known length": strings.NewReader(padded(g.body, 64<<10+1)),
			"chunked":      io.MultiReader(strings.NewReader(padded(g.body, 64<<10+1))),
		} {
			r.refused(g.path+": "+name, http.StatusRequestEntityTooLarge, func() reply { return r.exchange(r.request(g.method, path, super, body)) })
		}
		// What was refused would have succeeded otherwise, up to the last byte, and
		// whatever unknown fields hold.
		body := with(g.body, `"OWNERID":{"\u0001":"\ud83d\ude00"},"Uuid":[null]`)
		r.want(r.send(g.method, path, super, padded(body, 64<<10)), g.status)
	}
}

// inGo are words that mean something to us alone.
var inGo = regexp.MustCompile(`jsontext|unmarshal|int64|\bGo\b|struct|offset|api\.`)

func padded(object string, size int) string {
	const frame = `"pad":""`
	return with(object, `"pad":"`+strings.Repeat("x", size-len(object)-len(frame)-1)+`"`)
}

// spare is a credential of the kind that a route is about.
func (r *rig) spare(org string, a apiRoute) string {
	r.t.Helper()
	kind := store.APIKey
	if strings.Contains(a.path, "/clients") {
		kind = store.Client
	}
	_, c := r.credential(org, kind)
	return c.ID
}

func TestEveryRouteThatReadsJSONIsTestedForIt(t *testing.T) {
	left := servedRoutes(t)
	for _, g := range goodBodies {
		delete(left, g.apiRoute)
	}
	for _, path := range bodiless {
		delete(left, apiRoute{"POST", path})
	}
	for a := range left {
		if a.method == "POST" {
			t.Errorf("%s is in neither goodBodies nor bodiless", a)
		}
	}
}

func TestFieldsOfTheWrongKindAreRefused(t *testing.T) {
	r := discreetRig(t)
	acme, super := r.org("acme"), r.super()
	r.createLock(2, acme)
	r.want(r.send("POST", "/locks/2/AddKey", acme, `{"keyUuid":"taken","keyIndexNumber":7}`), http.StatusOK)
	const bad, conflict = http.StatusBadRequest, http.StatusConflict
	long := strings.Repeat("é", 128) // 256 bytes
	keys := func(n int) string { return strings.TrimSuffix(strings.Repeat(`{"uuid":"k"},`, n), ",") }
	lock1 := func(more string) string { return with(`{"index":1,"uuid":"u"}`, more) }
	for _, c := range []struct {
		path, body string
		status     int
		says       string // the field, so that the refusal is for the right reason
	}{
		{"/locks/2/OpenLock", `{"requestId":1}`, bad, "requestId"},
		{"/locks/2/OpenLock", `{"requestId":null}`, bad, "requestId must not be null"},
		{"/locks/2/OpenLock", `{"requestId":{}}`, bad, "requestId"},
		{"/locks/2/OpenLock", `{"requestId":["a"]}`, bad, "requestId"},
		{"/locks/2/OpenLock", `{"requestId":"a\u0000b"}`, bad, "requestId must not contain the character U+0000"},
		{"/locks/2/OpenLock", `{"requestId":"` + long + `"}`, bad, "requestId may have at most 255 bytes"},
		{"/locks/2/OpenLock", `{"reason":true}`, bad, "reason"},
		{"/locks/2/OpenLock", `{"reason":null}`, bad, "reason"},
		{"/locks/2/OpenLock", `{"reason":"\u0000"}`, bad, "reason"},
		{"/locks/2/OpenLock", `{"reason":"` + strings.Repeat("x", 1001) + `"}`, bad, "reason may have at most 1000 characters"},
		{"/locks/2/OpenLock", `{"reason":"` + strings.Repeat("😀", 1001) + `"}`, bad, "reason"},
		{"/locks/2/OpenLock", `{"reason":"` + strings.Repeat(`\ud83d\ude00`, 1001) + `"}`, bad, "reason"},
		{"/locks/2/OpenLock", `{"expiresInSeconds":"5"}`, bad, "expiresInSeconds"},
		{"/locks/2/OpenLock", `{"expiresInSeconds":2.5}`, bad, "expiresInSeconds"},
		{"/locks/2/OpenLock", `{"expiresInSeconds":1}`, bad, "expiresInSeconds must be from 2 to 30"},
		{"/locks/2/OpenLock", `{"expiresInSeconds":31}`, bad, "expiresInSeconds must be from 2 to 30"},
		{"/locks/2/OpenLock", `{"expiresInSeconds":36028797018963973}`, bad, "expiresInSeconds"}, // 5 s, if it overflows

		{"/locks/1/CreateLock", ``, bad, "index"},
		{"/locks/1/CreateLock", `{}`, bad, "index"},
		{"/locks/1/CreateLock", `{"uuid":"u"}`, bad, "index"},
		{"/locks/1/CreateLock", `{"index":3,"uuid":"u"}`, bad, "index"},
		{"/locks/1/CreateLock", `{"index":"1","uuid":"u"}`, bad, "index"},
		{"/locks/1/CreateLock", `{"index":null,"uuid":"u"}`, bad, "index"},
		{"/locks/1/CreateLock", `{"index":1.5,"uuid":"u"}`, bad, "index"},
		{"/locks/1/CreateLock", `{"index":-1,"uuid":"u"}`, bad, "index"},
		{"/locks/1/CreateLock", `{"index":18446744073709551617,"uuid":"u"}`, bad, "index"},
		{"/locks/1/CreateLock", `{"index":1}`, bad, "uuid is required"},
		{"/locks/1/CreateLock", `{"index":1,"uuid":""}`, bad, "uuid must not be empty"},
		{"/locks/1/CreateLock", `{"index":1,"uuid":7}`, bad, "uuid"},
		{"/locks/1/CreateLock", `{"index":1,"uuid":"\u0000"}`, bad, "uuid"},
		{"/locks/1/CreateLock", `{"index":1,"uuid":"` + long + `"}`, bad, "uuid"},
		{"/locks/1/CreateLock", `{"index":1,"uuid":"uuid-2"}`, conflict, "another lock has this uuid"},
		{"/locks/1/CreateLock", lock1(`"serialNumber":"a b"`), bad, "serialNumber"},
		{"/locks/1/CreateLock", lock1(`"serialNumber":"é"`), bad, "serialNumber"},
		{"/locks/1/CreateLock", lock1(`"serialNumber":"a\n"`), bad, "serialNumber"},
		{"/locks/1/CreateLock", lock1(`"serialNumber":5`), bad, "serialNumber"},
		{"/locks/1/CreateLock", lock1(`"serialNumber":"` + strings.Repeat("x", 801) + `"`), bad, "serialNumber"},
		{"/locks/1/CreateLock", lock1(`"vendorName":"a b"`), bad, "vendorName"},
		{"/locks/1/CreateLock", lock1(`"vendorName":"` + strings.Repeat("x", 801) + `"`), bad, "vendorName"},
		{"/locks/1/CreateLock", lock1(`"ownerId":1`), bad, "ownerId"},
		{"/locks/1/CreateLock", lock1(`"ownerId":"` + long + `"`), bad, "ownerId"},
		{"/locks/1/CreateLock", lock1(`"keys":null`), bad, "keys"},
		{"/locks/1/CreateLock", lock1(`"keys":{}`), bad, "keys"},
		{"/locks/1/CreateLock", lock1(`"keys":["k"]`), bad, "keys/0"},
		{"/locks/1/CreateLock", lock1(`"keys":[null]`), bad, "key"},
		{"/locks/1/CreateLock", lock1(`"keys":[{}]`), bad, "uuid of a key is required"},
		{"/locks/1/CreateLock", lock1(`"keys":[{"uuid":"k"},{"uuid":""}]`), bad, "uuid of a key"},
		{"/locks/1/CreateLock", lock1(`"keys":[{"uuid":"k","uuid":"k"}]`), bad, "twice"},
		{"/locks/1/CreateLock", lock1(`"keys":[{"uuid":"k","indexNumber":"1"}]`), bad, "keys/0/indexNumber"},
		{"/locks/1/CreateLock", lock1(`"keys":[{"uuid":"k","indexNumber":null}]`), bad, "keys/0/indexNumber"},
		{"/locks/1/CreateLock", lock1(`"keys":[{"uuid":"k","userId":"\u0000"}]`), bad, "keys/0/userId"},
		{"/locks/1/CreateLock", lock1(`"keys":[{"uuid":"k","indexNumber":1},{"uuid":"l","indexNumber":1}]`), conflict, "index number"},
		{"/locks/1/CreateLock", lock1(`"keys":[` + keys(501) + `]`), bad, "500 keys"},

		{"/locks/2/SetOwner", ``, bad, "userId is required"},
		{"/locks/2/SetOwner", `{"userId":""}`, bad, "userId"},
		{"/locks/2/SetOwner", `{"userId":1}`, bad, "userId"},
		{"/locks/2/SetOwner", `{"userId":"` + long + `"}`, bad, "userId"},
		{"/locks/2/SetOrganization", `{}`, bad, "orgId is required"},
		{"/locks/2/SetOrganization", `{"orgId":null}`, bad, "orgId"},
		{"/locks/2/SetOrganization", `{"orgId":""}`, bad, "orgId"},
		{"/locks/2/SetOrganization", `{"orgId":"nobody"}`, bad, "no organization"},
		{"/locks/2/SetOrganization", `{"orgId":"operator"}`, bad, "no organization"},
		{"/locks/2/AddKey", `{}`, bad, "keyUuid is required"},
		{"/locks/2/AddKey", `{"keyUuid":""}`, bad, "keyUuid"},
		{"/locks/2/AddKey", `{"keyUuid":"k","keyIndexNumber":1.5}`, bad, "keyIndexNumber"},
		{"/locks/2/AddKey", `{"keyUuid":"k","keyIndexNumber":"1"}`, bad, "keyIndexNumber"},
		{"/locks/2/AddKey", `{"keyUuid":"k","userId":[]}`, bad, "userId"},
		{"/locks/2/AddKey", `{"keyUuid":"k","keyIndexNumber":7}`, conflict, "index number"},
		{"/locks/2/RemoveKey", ``, bad, "keyUuid"},
		{"/locks/2/RemoveKey", `{"keyUuid":""}`, bad, "keyUuid"},
		{"/locks/2/RemoveKey", `{"keyUuid":"","keyIndexNumber":7}`, bad, "keyUuid"},
		{"/locks/2/RemoveKey", `{"keyIndexNumber":"7"}`, bad, "keyIndexNumber"},
		{"/locks/2/RemoveKey", `{"keyUuid":"unknown"}`, http.StatusNotFound, "no such key"},
		{"/locks/2/RemoveKey", `{"keyUuid":"taken","keyIndexNumber":8}`, http.StatusNotFound, "no such key"},

		{"/admin/organizations", `{}`, bad, "id is required"},
		{"/admin/organizations", `{"id":"Acme Ltd"}`, bad, "organization id"},
		{"/admin/organizations", `{"id":"a/b"}`, bad, "organization id"},
		{"/admin/organizations", `{"id":"a|b"}`, bad, "organization id"},
		{"/admin/organizations", `{"id":"` + strings.Repeat("a", 64) + `"}`, bad, "organization id"},
		{"/admin/organizations", `{"id":"operator"}`, bad, "reserved"},
		{"/admin/organizations", `{"id":"acme"}`, conflict, "exists"},
		{"/admin/organizations", `{"id":"b","name":1}`, bad, "name"},
		{"/admin/organizations/acme/open-expiry", `{}`, bad, "openExpirySeconds"},
		{"/admin/organizations/acme/open-expiry", `{"openExpirySeconds":-1}`, bad, "openExpirySeconds"},
		{"/admin/organizations/acme/open-expiry", `{"openExpirySeconds":31}`, bad, "2"},
		{"/admin/organizations/acme/keys", `{"scopes":"locks:open"}`, bad, "scopes"},
		{"/admin/organizations/acme/keys", `{"scopes":["locks:everything"]}`, bad, "unknown scope"},
		{"/admin/organizations/acme/keys", `{"scopes":[]}`, bad, "scopes must not be empty"},
		{"/admin/organizations/acme/keys", `{"scopes":[null]}`, bad, "unknown scope"},
		{"/admin/organizations/acme/keys", `{"expiresInSeconds":0}`, bad, "expiresInSeconds"},
		{"/admin/organizations/acme/keys", `{"expiresInSeconds":-1}`, bad, "expiresInSeconds"},
		{"/admin/organizations/acme/keys", `{"expiresInSeconds":99999999999}`, bad, "expiresInSeconds"},
		{"/admin/organizations/acme/keys", `{"expiresInSeconds":1e3}`, bad, "expiresInSeconds"},
		{"/admin/organizations/operator/keys", `{}`, bad, "super keys only"},
		{"/admin/organizations/nobody/keys", `{}`, http.StatusNotFound, "no organization"},
		{"/admin/organizations/nobody/clients", `{}`, http.StatusNotFound, "no organization"},
		{"/admin/organizations/acme/keys/nothing/rotate", ``, http.StatusNotFound, "does not exist"},
		{"/admin/organizations/acme/keys/nothing/rotate", `{"overlapSeconds":-1}`, bad, "overlapSeconds"},
		{"/admin/users/nobody/suspend", ``, bad, "lower-case UUID"},
		{"/admin/users/AAAAAAAA-AAAA-4AAA-8AAA-AAAAAAAAAAAA/suspend", ``, bad, "lower-case UUID"},
	} {
		by := acme
		if strings.HasPrefix(c.path, "/admin") {
			by = super
		}
		message := r.refused(c.path+" "+c.body, c.status, func() reply { return r.send("POST", c.path, by, c.body) })
		if !strings.Contains(message, c.says) || inGo.MatchString(message) {
			t.Errorf("%s %.100s: says %q, want %q", c.path, c.body, message, c.says)
		}
	}
}

func TestWhatOpenLockMayBeSent(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	r.device(1)
	for _, body := range []string{
		``, `{}`, " {\r\n\t} ", `{"requestId":"","reason":""}`, `{"requestid":1,"REASON":null}`, `{"other":{"deep":[1,2,{"x":null}]}}`,
		`{"requestId":"` + strings.Repeat("é", 127) + `x"}`, // 255 bytes
		`{"reason":"` + strings.Repeat("😀", 1000) + `"}`,
		`{"reason":"` + strings.Repeat(`\ud83d\ude00`, 1000) + `"}`,
		`{"reason":"</script>\u2028\" \\ \t ` + "\u00a0é" + `"}`,
	} {
		a := r.want(r.send("POST", openPath(1), acme, body), http.StatusOK)
		var sent struct{ RequestID, Reason string }
		_ = json.Unmarshal([]byte(body), &sent)
		if got, _ := a.get("event", "data", "reason").(string); strings.Contains(body, `"reason"`) && got != sent.Reason {
			t.Errorf("reason %q became %q", sent.Reason, got)
		}
	}
	r.want(r.exchange(r.request("POST", openPath(1), acme, nil)), http.StatusOK)
	r.want(r.exchange(r.request("POST", openPath(1), acme, io.MultiReader(strings.NewReader(`{"reason":"chunked"}`)))), http.StatusOK)
}

func TestAContentTypeOtherThanJSONIsRefused(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	const good, bad = http.StatusBadGateway, http.StatusUnsupportedMediaType // there is no device
	for _, c := range []struct {
		body    string
		headers []string
		status  int
	}{
		{`{}`, nil, good},
		{`{}`, []string{"Content-Type", "application/json"}, good},
		{`{}`, []string{"Content-Type", "Application/JSON; Charset=UTF-8"}, good},
		{`{}`, []string{"Content-Type", `application/json;charset="utf-8"`}, good},
		{``, []string{"Content-Type", "text/plain"}, good}, // there is nothing of that type
		{`{}`, []string{"Content-Type", "text/plain"}, bad},
		{`{}`, []string{"Content-Type", "text/json"}, bad},
		{`{}`, []string{"Content-Type", "application/jsonx"}, bad},
		{`{}`, []string{"Content-Type", "application/problem+json"}, bad},
		{`{}`, []string{"Content-Type", "application/json; charset=latin1"}, bad},
		{`{}`, []string{"Content-Type", "application/json; charset=utf-16"}, bad},
		{`{}`, []string{"Content-Type", "application/json, text/plain"}, bad},
		{`{}`, []string{"Content-Type", "application/json; charset"}, bad},
		{`{}`, []string{"Content-Type", "/"}, bad},
		{`requestId=1`, []string{"Content-Type", "application/x-www-form-urlencoded"}, bad},
		{`{}`, []string{"Content-Type", "multipart/form-data; boundary=x"}, bad},
		{`{}`, []string{"Content-Encoding", "gzip"}, bad},
		{`{}`, []string{"Content-Type", "application/json", "Content-Encoding", "br"}, bad},
	} {
		do := func() reply {
			req := r.request("POST", openPath(1), acme, strings.NewReader(c.body))
			for i := 0; i < len(c.headers); i += 2 {
				req.Header.Set(c.headers[i], c.headers[i+1])
			}
			return r.exchange(req)
		}
		if c.status == good {
			r.want(do(), good)
		} else {
			r.refused(fmt.Sprint(c.headers), bad, do)
		}
	}
}

func TestNobodyIsBelievedWhoTheySayTheyAre(t *testing.T) {
	r := discreetRig(t)
	super := r.super()
	check := func(a apiRoute, c creds) {
		for _, header := range []string{"X-Org-Id", "X-User-Id", "x-org-id"} {
			for _, value := range []string{"acme", ""} {
				r.refused(header+" on "+a.String(), http.StatusBadRequest, func() reply { return r.send(a.method, a.at("1"), c, nil, header, value) })
			}
		}
	}
	for a, who := range servedRoutes(t) {
		if who != "anybody" {
			check(a, super)
			check(a, creds{}) // nor does it matter who says so
		}
	}
}

func TestOtherMethodsAreRefusedAndNamed(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	served := servedRoutes(t)
	methods := map[string][]string{} // by path
	for a := range served {
		methods[a.path] = append(methods[a.path], a.method)
	}
	for a := range documentedRoutes(t) {
		if _, ok := served[a]; !ok {
			methods[a.path] = append(methods[a.path], a.method)
		}
	}
	for path, allowed := range methods {
		if slices.Contains(allowed, "GET") {
			allowed = append(allowed, "HEAD")
		}
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"} {
			if slices.Contains(allowed, method) {
				continue
			}
			r.refused(method+" "+path, http.StatusMethodNotAllowed, func() reply {
				a := r.exchange(r.request(method, apiRoute{path: path}.at("1"), acme, nil))
				named := strings.Split(a.header.Get("Allow"), ", ")
				if slices.Sort(named); !slices.Equal(named, slices.Sorted(slices.Values(allowed))) {
					t.Errorf("%s %s: Allow names %v, want %v", method, path, named, allowed)
				}
				return a
			})
		}
	}
}

func TestHEADIsAnsweredLikeGETAndChangesNothing(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	before := r.trace()
	for _, path := range []string{"/health", "/openapi.json", "/locks/1/basic-info", "/locks/1/details", "/locks/1/events", "/locks/1/commands"} {
		if a := r.exchange(r.request("HEAD", path, acme, nil)); a.status != http.StatusOK || a.raw != "" {
			t.Errorf("HEAD %s: %d %q", path, a.status, a.raw)
		}
		r.want(r.send("GET", path, acme, nil), http.StatusOK)
	}
	if r.trace() != before {
		t.Error("a read has changed something")
	}
}

func TestRoutesOfTheContractThatAreNotServedSaySo(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	served := servedRoutes(t)
	for a := range documentedRoutes(t) {
		if _, ok := served[a]; ok {
			continue
		}
		for _, c := range []creds{acme, {}} { // some are for guests, who have no credentials
			r.refused(a.String(), http.StatusNotImplemented, func() reply { return r.send(a.method, a.at("1"), c, nil) })
		}
	}
}

func TestAPageIsAnIntegerFromOne(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	for _, page := range []string{
		"0", "-1", "%2B1", "+1", "1.0", "1e1", "0x1", "abc", "1%00", "1%20", "2147483648", "99999999999999999999", "NaN", "1,2", "%D9%A1",
	} {
		r.refused("page="+page, http.StatusBadRequest, func() reply { return r.send("GET", "/locks/1/events?page="+page, acme, nil) })
	}
	for _, query := range []string{"", "?", "?page=", "?page=1", "?other=0&page=1", "?page=2147483647"} {
		r.want(r.send("GET", "/locks/1/events"+query, acme, nil), http.StatusOK)
	}
}

func TestAnIdempotencyKeyIsOnePrintableHeader(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	for _, path := range []string{openPath(1), "/locks/1/SetOwner"} {
		for _, keys := range [][]string{{""}, {strings.Repeat("k", 256)}, {"a\tb"}, {"é"}, {"a", "b"}, {"a", "a"}} {
			r.refused(fmt.Sprintf("%s %q", path, keys), http.StatusBadRequest, func() reply {
				req := r.request("POST", path, acme, strings.NewReader(`{"userId":"u"}`))
				req.Header["Idempotency-Key"] = keys
				return r.exchange(req)
			})
		}
	}
	r.want(r.send("POST", openPath(1), acme, nil, "Idempotency-Key", strings.Repeat("k", 253)+" ~"), http.StatusBadGateway)
}

// RFC 7240, 2: a preference that is not understood is ignored.
func TestAPreferenceThatIsNotUnderstoodIsIgnored(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	r.device(1)
	for _, prefer := range []string{"", "wait", "wait=", "wait=x", "wait=-1", "wait=1.5", "wait=+1", "wait=99999999999", "=", ";;", ",", "waits=5", "handling=strict", "a=wait=5", "wait;wait=5"} {
		a := r.want(r.send("POST", openPath(1), acme, nil, "Prefer", prefer), http.StatusOK)
		if applied := a.header.Get("Preference-Applied"); applied != "" {
			t.Errorf("Prefer: %q was applied as %q", prefer, applied)
		}
	}
	for prefer, want := range map[string]string{"wait=0": "wait=0", `WAIT="20"`: "wait=20", "wait = 20;x=y": "wait=20", "foo, wait=300": "wait=30"} {
		a := r.want(r.send("POST", openPath(1), acme, nil, "Prefer", prefer), http.StatusOK)
		if applied := a.header.Get("Preference-Applied"); applied != want {
			t.Errorf("Prefer: %q was applied as %q, want %q", prefer, applied, want)
		}
	}
}
