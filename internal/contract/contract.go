// Package contract carries the wire contract of the lock API inside the binary,
// so that the server can serve the very bytes that it is tested against.
//
// The two files are the source of truth for paths, fields, types and statuses.
// They are never edited to fit the code: the code is made to fit them, and
// package contracttest proves it on every answer of every test.
package contract

import _ "embed"

// OpenAPI is the OpenAPI 3.1 document of every path, shape and status on the
// wire. Callers must not change its bytes.
//
//go:embed wire.openapi.json
var OpenAPI []byte

// Events is a JSON object that maps the type of each domain event, such as
// "LockOpenRequested", to the JSON Schema of its payload. Callers must not
// change its bytes.
//
//go:embed events.schema.json
var Events []byte
